"""Where and with what a benchmark ran, and its rows on disk: ``results/NAME.csv``, appended to, never rewritten."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.spec import Benchmark, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENT = ("date", "commit", "dirty", "device", "num_threads", "torch", "transformers", "triton", "python")


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """The model, its number when the name says too little (virtual machines), and what matters for matmuls."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in path.read_text().split("\n\n", 1)[0].splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in lines.items()}
    flags = info.get("flags", "").split()
    extras = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags][:1]
    model = info.get("model name", platform.machine())
    return f"{model} (family {info.get('cpu family', '?')} model {info.get('model', '?')}{''.join(f', {e}' for e in extras)})"


def environment(device: str | None = None) -> Row:
    """The first columns of every row.

    ``dirty`` is 1 when tracked files other than results differ from the commit. ``device`` is the processor unless given. Where
    the files came without their repository, ``BENCHMARK_COMMIT`` says which commit they are.
    """
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs", ":!*.md"
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": os.environ.get("BENCHMARK_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "dirty": int(bool(changed)),
        "device": device or _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def path_of(benchmark: Benchmark) -> Path:
    """The benchmark's CSV."""
    return RESULTS / f"{benchmark.name}.csv"


def append(benchmark: Benchmark, rows: list[Row]) -> Path:
    """Append rows (environment and benchmark columns) to the CSV; its header must be the present one."""
    path, header = path_of(benchmark), [*ENVIRONMENT, *benchmark.columns]
    for row in rows:
        unknown = row.keys() - set(header)
        assert not unknown, f"{benchmark.name} has no column {sorted(unknown)}"
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != header:
            raise ValueError(f"{path.name} has other columns than {benchmark.name} now writes; rename the old file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def latest(benchmark: Benchmark, part: str | None = None) -> list[dict[str, str]]:
    """The rows of the last run in the CSV (those with its last row's date); empty where there is no file.

    With ``part``, of the last run that has rows of this part, and those rows alone.
    """
    path = path_of(benchmark)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if part is None or row.get("part") == part]
    return [row for row in rows if row["date"] == rows[-1]["date"]] if rows else []
