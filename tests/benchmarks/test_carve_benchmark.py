"""`carve`: the gate sees a wrong grouping, rows say what was measured, and a run that was stopped goes on."""

from pathlib import Path

import pytest
import torch

from benchmarks.carve import benchmark, released
from benchmarks.carve.cells import FULL, SHAPES, cells
from benchmarks.record import ENVIRONMENT
from benchmarks.spec import Options
from moe.convert.carve import CARVERS, cmoe

QUICK = Options(quick=True, repeats=2)


def test_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = benchmark.gate(QUICK)
    assert all(check.passed for check in checks)
    assert len(checks) == len(CARVERS) + 2

    def anywhere(scores_TE: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(scores_TE)) % scores_TE.shape[1]

    monkeypatch.setattr(cmoe, "balanced_assignment", anywhere)
    red = [check.name for check in benchmark.gate(QUICK) if not check.passed]
    assert red == ["cmoe: distance above the released steps'"]


def test_released_steps_give_a_carving() -> None:
    from moe.convert.carve.types import CarveShape, LayerInputs
    from moe.convert.dense import DenseFFN

    ffn = DenseFFN(gate_FD=torch.randn(24, 8), up_FD=torch.randn(24, 8), down_DF=torch.randn(8, 24))
    inputs = LayerInputs(x_TD=torch.randn(60, 8), weights_T=torch.ones(60), sequence_T=torch.zeros(60).long())
    shape = CarveShape(num_experts=6, num_shared=2, top_k=2)
    released.carve(ffn, inputs, shape, torch.Generator()).check(24)


def test_quality_rows(tmp_path: Path) -> None:
    from moe.models.folder import ModelFolder

    source = ModelFolder(benchmark.tiny_model(tmp_path / "dense"))
    finished = benchmark.Finished(tmp_path / "partial.jsonl")
    rows = benchmark._quality(source, QUICK, finished)
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)
    assert [row["method"] for row in rows] == ["dense", *(cell.label for cell in cells(quick=True))]
    by_method = {(row["method"], row.get("calibration"), row.get("seed")): row for row in rows}
    assert by_method["cmoe, as released", "in-domain", 0]["tokens"] == 128
    assert by_method["static", "in-domain", 0]["seconds"] is None, "it was carved with its refitted twin"
    assert by_method["static + refit", "in-domain", 0]["s_per_mparam"] > 0
    assert (
        by_method["static + refit", "in-domain", 0]["energy_kept"] > by_method["static", "in-domain", 0]["energy_kept"]
    )
    reports: list[str] = []
    again = benchmark._quality(
        source, Options(quick=True, report=reports.append), benchmark.Finished(tmp_path / "partial.jsonl")
    )
    assert again == rows
    assert not any("carved layer" in line for line in reports), "finished cells were carved again"


@pytest.mark.slow
def test_cost_rows(tmp_path: Path) -> None:
    rows = benchmark.run(Options(quick=True, repeats=1, part="cost"))
    assert rows[0]["of_released"] == 1.0
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)


def test_the_table_is_what_was_asked_for() -> None:
    keys = [cell.key for cell in cells(quick=False)]
    assert len(keys) == len(set(keys))
    assert {cell.options.shape for cell in cells(quick=False)} == set(SHAPES)
    assert FULL.tokens <= 65536
    for shape in SHAPES:
        labels = {cell.label for cell in cells(quick=False) if cell.options.shape == shape}
        assert {"cmoe, as released", "static", "static + refit", "weaver", "llama-moe", "cmoe + refit"} <= labels
