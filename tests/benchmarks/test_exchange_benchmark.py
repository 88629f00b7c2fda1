"""The benchmark of the exchange: rows fit the CSV, and what it counts is what the formula expects."""

import pytest

from benchmarks import exchange
from benchmarks.spec import Options

QUICK = Options(quick=True, repeats=1)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, object]]:
    return {str(row["implementation"]): row for row in exchange.measure_bytes(QUICK)}


def test_bytes(rows: dict[str, dict[str, object]]) -> None:
    assert all(row.keys() <= set(exchange.BENCHMARK.columns) for row in rows.values())
    assert rows["dedup"]["forward_combine_share"] == pytest.approx(0.25, abs=0.01)
    for row in rows.values():
        assert row["total_mb"] == pytest.approx(row["expected_mb"], rel=0.05)


def test_the_gate_is_green_and_compares_every_gradient() -> None:
    checks = exchange.gate(QUICK)
    assert [check.name for check in checks if not check.passed] == []
    for name in exchange.EXACT | exchange.ROUNDED:
        for key in ("y", "dx", "d router.weight", "d experts.down_proj", "d shared_experts.down_proj.weight"):
            assert sum(check.name.endswith(f"{name}: {key}") for check in checks) >= 2
    fp8 = [check.error for check in checks if "fp8: y" in check.name]
    assert min(fp8) > 0.01  # the comparison sees what is rounded
