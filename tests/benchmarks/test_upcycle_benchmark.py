"""`upcycle`: the gate sees a method that changes the function, and a quick run has every method and seed."""

import pytest

from benchmarks import record, upcycle
from benchmarks.spec import Options
from moe.convert.upcycle.virtual_group import VirtualGroup

QUICK = Options(quick=True, repeats=1)


def test_the_gate_is_green_and_sees_wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = upcycle.gate(QUICK)
    assert len(checks) == len(upcycle.EXACT)
    assert all(check.passed for check in checks), checks
    monkeypatch.setattr("moe.convert.upcycle.virtual_group.group_size", lambda options: 1)
    monkeypatch.setattr(VirtualGroup, "keeps_function", lambda *_: False)  # else `upcycle` itself refuses the result
    assert [check.name for check in upcycle.gate(QUICK) if not check.passed] == [
        "virtual group: logits before training"
    ]


def test_a_quick_run_has_every_method_and_seed() -> None:
    size = upcycle.QUICK
    rows = upcycle.run(QUICK)
    methods = [upcycle.DENSE, upcycle.SCRATCH, *upcycle.METHODS]
    runs = {(row["method"], row["seed"]): row for row in rows if row["part"] == "run"}
    assert runs.keys() == {(method, seed) for method in methods for seed in upcycle.SEEDS}
    means = {row["method"]: row for row in rows if row["part"] == "mean"}
    assert list(means) == methods
    first, last = (f"loss_{point}" for point in (size.points[0], size.points[-1]))
    for seed in upcycle.SEEDS:
        dense = runs[upcycle.DENSE, seed]
        for method in ("copy", "virtual group"):
            row = runs[method, seed]
            assert row["step0_diff"] < 1e-5
            assert row[first] == pytest.approx(dense[first], abs=2e-4)
        for method in ("drop 0.5", "noise"):
            assert runs[method, seed]["step0_diff"] > 1e-4
        assert all(runs[method, seed][last] < runs[method, seed][first] for method in methods)
    copy = [runs["copy", seed] for seed in upcycle.SEEDS]
    assert means["copy"][last] == pytest.approx(sum(row[last] for row in copy) / 2, abs=1e-4)
    assert copy[0][last] != copy[1][last]
    known = {*record.ENVIRONMENT, *upcycle.BENCHMARK.columns}
    known |= {f"loss_{point}" for point in size.points}
    assert all(row.keys() <= known for row in rows)
