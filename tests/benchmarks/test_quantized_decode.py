"""`quantized-decode`: the gate sees wrong products, and a quick run has a row of every variant in every case."""

import pytest
from torch import Tensor

from benchmarks import quantized_decode, record
from benchmarks.spec import Options
from moe.kernels.quantized_cpu import Int4Weight

QUICK = Options(quick=True, repeats=1)


def test_the_gate_is_green_and_sees_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = quantized_decode.gate(QUICK)
    assert checks
    assert all(check.passed for check in checks), checks
    product = Int4Weight.product

    def wrong(self: Int4Weight, rows_rQ: Tensor, expert: int) -> Tensor:
        return product(self, rows_rQ, expert) * 1.05

    monkeypatch.setattr(Int4Weight, "product", wrong)
    red = [check.name for check in quantized_decode.gate(QUICK) if not check.passed]
    assert red
    assert all("w4a16" in name for name in red)


def check_rows(part: str) -> None:
    rows = quantized_decode.run(Options(quick=True, repeats=1, part=part))
    cases = {row["case"] for row in rows}
    assert [(row["case"], row["variant"]) for row in rows if row["runs_on"] == "cpu"] == [
        (case, variant) for case in dict.fromkeys(row["case"] for row in rows) for variant in quantized_decode.VARIANTS
    ]
    assert cases
    known = {*record.ENVIRONMENT, *quantized_decode.BENCHMARK.columns}
    for row in rows:
        assert row.keys() <= known
        assert row["tokens_per_s"] > 0
    if part == "model":
        sizes = [row["weights_mb"] for row in rows[:3]]
        assert sizes == sorted(sizes, reverse=True)
        assert all(row["peak_mb"] > 0 for row in rows)


def test_a_quick_run_of_banks() -> None:
    check_rows("bank")


@pytest.mark.slow  # a process for each variant
def test_a_quick_run_of_models() -> None:
    check_rows("model")
