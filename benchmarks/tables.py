"""Markdown tables from results: ``python -m benchmarks.tables`` rewrites the marked regions of the documents.

A region is everything between ``<!-- table: NAME -->`` and ``<!-- end -->``; with ``COLUMN=X`` after the name, once or more, only
the rows whose column is X.
"""

import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put benchmarks/ first on the path, where the root belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import ROOT, latest, path_of
from benchmarks.registry import BENCHMARKS
from benchmarks.spec import Benchmark

_REGION = re.compile(r"(<!-- table: ([\w-]+)((?: \w+=[\w-]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(benchmark: Benchmark, **only: str) -> str:
    """The latest run as a markdown table, with a line that says where it ran and with which command."""
    part = only.get("part")
    rows = [row for row in latest(benchmark, part) if all(row[column] == value for column, value in only.items())]
    if not rows:
        return f"No run of `{benchmark.name}`{f', part {part},' if part else ''} is recorded yet.\n"
    first = rows[0]
    shown = [column for column in benchmark.table if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(column.replace("_", " ") for column in shown) + " |"]
    lines.append("|" + "|".join(" --- " for _ in shown) + "|")
    lines += ["| " + " | ".join(row[column] for column in shown) + " |" for row in rows]
    where = (
        f"{first['device']}, {first['num_threads']} threads, torch {first['torch']}, transformers {first['transformers']}, "
        f"commit {first['commit']}{' with changes' if first['dirty'] == '1' else ''}, {first['date']}. "
        f"Command: `python benchmarks/run.py {benchmark.name}`; every run: `{path_of(benchmark).relative_to(ROOT)}`."
    )
    return "\n".join([*lines, "", where]) + "\n"


def fill(text: str) -> str:
    """``text`` with every marked region rewritten from the CSVs."""

    def region(match: re.Match[str]) -> str:
        opening, name, only, closing = match.groups()
        if name not in BENCHMARKS:
            raise ValueError(f"table: {name!r} is no benchmark; use one of {sorted(BENCHMARKS)}")
        return opening + markdown(BENCHMARKS[name](), **dict(pair.split("=") for pair in only.split())) + closing

    return _REGION.sub(region, text)


def main() -> None:
    """Rewrite README.md, kernels/README.md and docs/*.md in place."""
    for path in [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if path.exists() and (filled := fill(before := path.read_text())) != before:
            path.write_text(filled)
            print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
