"""The folder of a checkpoint: names, the manifest, what makes it valid, and writing that survives a crash."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST, STATE = "manifest.json", "state.json"
_HASHING_THREADS = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or trusted; the message says which file and why."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the manifest says of a file: its size in bytes and the sha256 of its content in hex."""

    size: int
    sha256: str


def step_dir(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return root / f"step-{step:08d}"


def partial_dir(root: Path, step: int) -> Path:
    """Where that checkpoint is while it is being written."""
    return root / f".partial-step-{step:08d}"


def rank_file(folder: Path, rank: int) -> Path:
    """The tensors that ``rank`` wrote."""
    return folder / f"rank-{rank:04d}.safetensors"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete-looking checkpoints under ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / MANIFEST).is_file())


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def attachments(path: Path) -> list[Path]:
    """The files that the trainer added to a checkpoint: its tokenizer's."""
    return sorted(
        file for file in path.iterdir() if file.name not in (MANIFEST, STATE) and not file.match("rank-*.safetensors")
    )


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write and sync a small file."""
    path.write_bytes(content)
    sync(path)
    return FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(folder: Path, files: dict[str, FileRecord]) -> None:
    """Say what a complete folder holds."""
    manifest = {name: {"size": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync(folder)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed; it is named.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: FileRecord(size=entry["size"], sha256=entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as problem:  # absent, garbled, or of another kind
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {problem}") from problem
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != record.size:
            raise CheckpointError(f"{file} is truncated: {file.stat().st_size} bytes instead of {record.size}")
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:  # hashing runs outside of the GIL
        for name, sha256 in zip(files, pool.map(lambda name: _sha256(path / name), files), strict=True):
            if sha256 != files[name].sha256:
                raise CheckpointError(f"{path / name} is corrupted: its sha256 is not the one in {MANIFEST}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `verify`, and what was wrong with newer ones."""
    problems = []
    for path in reversed(list_checkpoints(root)):
        try:
            verify(path)
        except CheckpointError as problem:
            problems.append(str(problem))
        else:
            return path, problems
    return None, problems
