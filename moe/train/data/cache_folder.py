"""Cache folders: where they are, what keys them, and how several processes may build the same one at once."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_root(cache_dir: str | None) -> Path:
    """`cache_dir`, else `$MOE_CACHE`, else `~/.cache/moe`."""
    return Path(cache_dir or os.environ.get("MOE_CACHE") or "~/.cache/moe").expanduser()


def content_key(content: Any) -> str:
    """32 hexadecimal digits of a hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def publish(folder: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write a temporary folder, then rename it to `folder`: others see all of it or nothing.

    Two processes may do this at once; the first to finish wins, and the other's work is thrown away.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
