"""`checkpoint`: the gate sees a checkpoint of a later state, and rows say what was measured; in a process of its own."""

from typing import Any
from unittest import mock

import pytest
from helpers.ranks import run_ranks

from benchmarks import checkpoint as benchmark
from benchmarks.spec import Options, Row
from moe.parallel.checkpoint import saving
from moe.parallel.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot
from moe.parallel.engine import Engine

QUICK = Options(quick=True, repeats=2)


def work(rank: int, world_size: int) -> dict[str, Any]:
    def too_late(engine: Engine, memory: HostMemory) -> Snapshot:
        benchmark.train_step(engine, benchmark.QUICK_SIZE)
        return take_snapshot(engine, memory)

    found: dict[str, Any] = {"green": benchmark.gate(QUICK), "rows": benchmark.run(QUICK)}
    with mock.patch.object(saving, "take_snapshot", too_late):
        found["red"] = benchmark.gate(QUICK)
    return found


@pytest.mark.slow
def test_gate_and_rows() -> None:
    (found,) = run_ranks(work, 1)
    assert [check.passed for check in found["green"]] == [True]
    assert [check.passed for check in found["red"]] == [False]
    rows: list[Row] = found["rows"]
    names = [benchmark.WAIT, benchmark.DEEPSPEED, benchmark.BESIDE, benchmark.CHECKSUMS, benchmark.FILE]
    assert [row["implementation"] for row in rows] == names
    assert all(row.keys() <= set(benchmark.COLUMNS) and row["repeats"] == 2 for row in rows)
    assert rows[0]["of_wait"] == 1 and float(str(rows[2]["until_written_ms"])) > 0
