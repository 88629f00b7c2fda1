"""The standard library of the running Python as a corpus: about 12 MB of code and prose that every machine has.

It makes the default recipe work with no network. Its tests are left out (tables and generated cases, not code that
one would read), and so is what is installed beside it.
"""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.train.data.documents import Document, is_blank

_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class StdlibSource:
    """One document per *.py file, and one per topic of `help()`; the id is the path relative to the library."""

    root: Path = field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))
    label: str = "stdlib"

    def documents(self) -> Iterator[Document]:
        """In the order of their paths."""
        for path in self._files():
            name = path.relative_to(self.root).as_posix()
            text = path.read_bytes().decode("utf-8", errors="replace")
            documents = _topics(text) if name == _TOPICS else [Document(name, text)]
            yield from (document for document in documents if not is_blank(document.text))

    def identity(self) -> Any:
        """Python's version, and size and time of every file."""
        files = [(path.relative_to(self.root).as_posix(), path.stat()) for path in self._files()]
        return ["stdlib", platform.python_version(), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]]

    def _files(self) -> list[Path]:
        files = []
        for folder, subfolders, names in os.walk(self.root):
            # in place, so that the walk stays out of them: site-packages may be huge
            subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        if not files:
            raise ValueError(
                f"data.source='stdlib' found no *.py files under {self.root} (this Python ships its library without "
                "sources): give a text file, e.g. data.source=corpus.txt"
            )
        return sorted(files, key=lambda path: path.relative_to(self.root).as_posix())


def _topics(code: str) -> Iterator[Document]:
    """The module is one dictionary of strings: as text it is prose, as code it would be escapes in quotes."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(f"pydoc_data/topics/{topic}", text)
