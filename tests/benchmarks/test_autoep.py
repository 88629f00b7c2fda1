"""`autoep` on tiny sizes: both models learn the same, and rows say who sent less."""

import pytest

from benchmarks.autoep import BENCHMARK
from benchmarks.spec import Options


@pytest.mark.slow
def test_gate_and_rows() -> None:
    options = Options(quick=True)
    checks = BENCHMARK.gate(options)
    assert len(checks) == 8
    assert all(check.passed for check in checks), checks
    rows = BENCHMARK.run(options)
    assert len(rows) == 16
    assert all(set(row) <= set(BENCHMARK.columns) for row in rows)
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs["implementation"], ours["implementation"]) == ("AutoEP", "moe")
        assert theirs["speedup"] == theirs["bytes_ratio"] == 1
        assert float(ours["bytes_ratio"] or 0) < 1
