"""Local files as a corpus: .txt (cut into blocks), .jsonl and .parquet (one row, one document).

Read here and not by `datasets`: its `load_dataset` asks the network even for a local file (a download counter; without
a network each file waits for the time-out), its jsonl reader refuses a file with one invalid UTF-8 byte, and it guesses
a type for every column from the first chunk, so that a later row of another shape fails in a column nobody asked for.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.train.data.documents import Document, is_blank, missing_column, row_text
from moe.train.data.pieces import file_blocks

_MIN_BLOCK_BYTES = 1 << 10
_MAX_BLOCK_BYTES = 1 << 16
_BLOCKS_WANTED = 64
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class FileSource:
    """The files that `pattern` (a path or glob, `**` allowed) matches, in the order of their paths."""

    pattern: str
    text_column: str = "text"

    @property
    def label(self) -> str:
        """The pattern."""
        return self.pattern

    def documents(self) -> Iterator[Document]:
        """Ids are `<path below the folder that all files share>#<block or line or row>`."""
        paths = self._paths()
        text_bytes = sum(path.stat().st_size for path in paths if path.suffix == ".txt")
        # Small corpora get small blocks, so that a share of them can be held out.
        block_bytes = min(max(text_bytes // _BLOCKS_WANTED, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            name = path.relative_to(folder).as_posix()
            for number, text in _READERS[path.suffix](path, self.text_column, block_bytes):
                if not is_blank(text):
                    yield Document(f"{name}#{number}", text)

    def identity(self) -> Any:
        """Path, size and time of every file."""
        stats = [(str(path), path.stat()) for path in self._paths()]
        return ["files", self.text_column, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]]

    def _paths(self) -> list[Path]:
        pattern = os.path.expanduser(self.pattern)
        if os.path.isdir(pattern):
            raise ValueError(
                f"data.source={self.pattern!r} is a folder: name its files with a glob, e.g. {self.pattern}/**/*.txt"
            )
        # A path that exists is taken literally, even with the characters of a glob in its name.
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        # Links stay as they are: in the cache of the hub, only the link's name has the suffix.
        paths = sorted(Path(os.path.abspath(match)) for match in matches if os.path.isfile(match))
        if not paths:
            raise ValueError(
                f"data.source={self.pattern!r} matches no file: write 'stdlib', the path or glob of existing "
                f"{', '.join(_READERS)} files, or hub:<dataset>"
            )
        for path in paths:
            if path.suffix not in _READERS:
                raise ValueError(
                    f"data.source={self.pattern!r} matches {path.name!r}, which is none of {', '.join(_READERS)}: "
                    "convert it, or narrow the glob"
                )
        return paths


def _read_txt(path: Path, text_column: str, block_bytes: int) -> Iterator[tuple[int, str]]:
    yield from enumerate(file_blocks(path, block_bytes))


def _read_jsonl(path: Path, text_column: str, block_bytes: int) -> Iterator[tuple[int, str]]:
    columns: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
            if is_blank(text):
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}): a .jsonl file has one object on each line") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where} is a JSON {type(row).__name__}, not an object: "
                    f"write one object on each line, with the text under {text_column!r} (data.text_column)"
                )
            columns.update(row)
            if text_column in row:
                # JSON can spell half a surrogate pair, which no tokenizer takes.
                yield number, row_text(row, text_column, where).encode("utf-8", errors="replace").decode()
    if columns and text_column not in columns:
        raise missing_column(text_column, columns, str(path))


def _read_parquet(path: Path, text_column: str, block_bytes: int) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_column not in file.schema_arrow.names:
            raise missing_column(text_column, file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_column]):
            for row in batch.to_pylist():
                yield number, row_text(row, text_column, str(path))
                number += 1


_READERS: dict[str, Callable[[Path, str, int], Iterator[tuple[int, str]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
