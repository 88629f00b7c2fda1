"""`recovery`: the gate sees wrong experts, and a quick run has every method, seed and point."""

import pytest
import torch

from benchmarks import pictures, record, recovery, run
from benchmarks.spec import Options, Row
from moe.convert.tomoe.experts import ExpertPlan

QUICK = Options(quick=True, repeats=1)


def test_the_gate_is_green_and_sees_wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = recovery.gate(QUICK)
    assert len(checks) == 3
    assert all(check.passed for check in checks), checks
    rows = ExpertPlan.layer
    monkeypatch.setattr(ExpertPlan, "layer", lambda self, index, ffn: rows(self, 0, ffn))
    wrong = [check.name for check in recovery.gate(QUICK) if not check.passed]
    assert wrong == ["masks as experts: logits"]  # all neurons are in one expert whatever the layer


def test_a_quick_run_has_every_method_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, draw = [], recovery.draw

    def drawn(rows: list[Row], size: recovery.Size) -> object:
        pages.append(draw(rows, size))
        return pages[-1]

    monkeypatch.setattr(recovery, "draw", drawn)
    monkeypatch.setattr(record, "append", lambda *args: pytest.fail("recorded"))
    monkeypatch.setattr(pictures, "save", lambda *args: pytest.fail("saved a picture"))
    torch.manual_seed(0)
    rows = run.execute(recovery.BENCHMARK, QUICK)["rows"]
    assert isinstance(rows, list)
    size, methods = recovery.QUICK, list(recovery.METHODS)
    assert {recovery.DENSE, recovery.TOMOE, "cmoe"} <= set(methods)
    runs = {(row["method"], row["seed"]): row for row in rows if row["part"] == "run"}
    assert runs.keys() == {(method, seed) for method in methods for seed in recovery.SEEDS}
    assert all(row[f"ppl_{step}"] > 1 for row in runs.values() for step in size.points)
    dense = [runs[recovery.DENSE, seed]["ppl_0"] for seed in recovery.SEEDS]
    assert dense[0] == dense[1]
    masks = {(row["active_share"], row["seed"]): row for row in rows if row["part"] == "masks"}
    assert masks.keys() == {(share, seed) for share in recovery.SHARES for seed in recovery.SEEDS}
    for seed in recovery.SEEDS:  # what is recovered is what the masks came to
        last = masks[recovery.SHARES[0], seed][f"masks_ppl_{size.mask_points[-1]}"]
        assert runs[recovery.TOMOE, seed]["ppl_0"] == pytest.approx(last, rel=1e-3)
    means = {row["method"]: row for row in rows if row["part"] == "mean"}
    assert list(means) == methods
    pair = [runs["cmoe", seed]["ppl_4"] for seed in recovery.SEEDS]
    assert means["cmoe"]["ppl_4"] == pytest.approx(sum(pair) / 2, abs=1e-3)
    assert pair[0] != pair[1]
    left, right = pages[0].axes
    assert len(left.lines) == 3 * len(methods)
    assert len(right.lines) == len(masks)
    known = {*record.ENVIRONMENT, *recovery.BENCHMARK.columns}
    known |= {f"ppl_{step}" for step in size.points} | {f"masks_ppl_{step}" for step in size.mask_points}
    assert all(row.keys() <= known for row in rows)
