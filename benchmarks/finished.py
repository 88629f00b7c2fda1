"""Rows of finished cells by key, in a file beside the results: a benchmark of hours that was stopped goes on where it was."""

import json
from pathlib import Path

from benchmarks.record import environment
from benchmarks.spec import Row


class Finished:
    """Rows of this commit that were finished before; those of other commits in the file are not read.

    Args:
        path: of the file; ``None`` keeps rows in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self._commit = environment()["commit"]
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["commit"] == self._commit:
                    self.rows[entry["key"]] = entry["row"]

    def add(self, key: str, row: Row) -> None:
        """Keep a row."""
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"commit": self._commit, "key": key, "row": row}) + "\n")

    def remove(self) -> None:
        """Delete the file, once its rows are recorded."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
