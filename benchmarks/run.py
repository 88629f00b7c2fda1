"""Run a benchmark: ``python benchmarks/run.py NAME`` (or ``python -m benchmarks.run NAME``); ``--list`` names them."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put benchmarks/ first on the path, where the root belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import record, tables
from benchmarks.registry import BENCHMARKS
from benchmarks.spec import Benchmark, Cell, Options, Row
from benchmarks.verify import RedGate, verify


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument("--table", action="store_true", help="print the latest recorded run as markdown; runs nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; records nothing")
    parser.add_argument("--part", help="run this part of the benchmark only")
    parser.add_argument("--repeats", type=int, default=9, help="measured repeats of each implementation (9)")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="wait up to S seconds for idle processors before each repeat",
    )
    args = parser.parse_args(argv)
    if args.name is None and not args.list:
        parser.error("give a NAME, or --list")
    if args.name is not None and args.part is not None and args.part not in (parts := BENCHMARKS[args.name]().parts):
        parser.error(f"--part={args.part} is no part of {args.name}; it has {', '.join(parts) or 'none'}")
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} must be at least 1")
    return args


def _text(value: Cell) -> str:
    return "" if value is None else str(value)


def _print_rows(benchmark: Benchmark, rows: list[Row]) -> None:
    shown = [column for column in benchmark.table if any(_text(row.get(column)) for row in rows)]
    cells = [shown, *([_text(row.get(column)) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def execute(benchmark: Benchmark, options: Options) -> dict[str, object]:
    """Gate, then measure, then record; the result is what ``--json`` prints. A red gate leaves ``rows`` empty."""
    environment = record.environment()
    result: dict[str, object] = {"benchmark": benchmark.name, "quick": options.quick, "environment": environment}
    try:
        checks = verify(benchmark, options)
    except RedGate as red:
        return result | {"gate": "red", "reason": str(red), "rows": []}
    rows = benchmark.run(options)
    if not options.quick:
        path = record.append(benchmark, [environment | row for row in rows])
        options.report(f"appended {len(rows)} rows to {path.relative_to(record.ROOT)}")
    return result | {"gate": "green", "num_checks": len(checks), "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 when the gate is red."""
    args = _parse(argv)
    if args.list:
        for name, load in BENCHMARKS.items():
            print(f"{name:16} {load().description}")
        return 0
    benchmark = BENCHMARKS[args.name]()
    if args.table:
        print(tables.markdown(benchmark), end="")
        return 0
    start = time.perf_counter()

    def report(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    options = Options(
        quick=args.quick,
        repeats=2 if args.quick else args.repeats,
        wait_s=args.wait,
        part=args.part,
        report=report,
    )
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print; stdout carries the result only
        result = execute(benchmark, options)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    elif result["gate"] == "green":
        _print_rows(benchmark, result["rows"])  # type: ignore[arg-type]
    if result["gate"] == "red":
        print(f"no times: {result['reason']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
