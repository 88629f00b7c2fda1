"""Figures of the report, against plain arithmetic."""

import pytest
import torch
from torch import Tensor

from moe.quant.grids import Grid, IntGrid
from moe.quant.inputs import Rows
from moe.quant.report import ERROR_ROWS, ErrorMeter, LayerReport, MatrixReport, QuantReport

GRID = IntGrid(bits=8)


def rows(*sizes: int) -> list[Rows]:
    generator = torch.Generator().manual_seed(0)
    return [Rows(x_nQ=torch.randn(n, 6, generator=generator), weights_n=torch.ones(n)) for n in sizes]


def measured(before_EPQ: Tensor, after_EPQ: Tensor, inputs: list[Rows], grid: Grid | None) -> MatrixReport:
    meter = ErrorMeter(grid)
    for before_PQ, after_PQ, seen in zip(before_EPQ, after_EPQ, inputs, strict=True):
        meter.add(before_PQ, after_PQ, seen)
    return meter.report("up")


def error(x_nQ: Tensor, before_PQ: Tensor, after_PQ: Tensor) -> float:
    y_nP = x_nQ @ before_PQ.T
    return float((GRID.simulate(x_nQ) @ after_PQ.T - y_nP).norm() / y_nP.norm())


def test_errors_count_rounded_activations_and_name_the_worst_expert() -> None:
    """An expert without tokens has none."""
    before_EPQ, inputs = torch.randn(3, 4, 6), rows(5, 0, 9)
    after_EPQ = before_EPQ + 0.01 * torch.randn(3, 4, 6)
    found = measured(before_EPQ, after_EPQ, inputs, GRID)
    each = [error(inputs[expert].x_nQ, before_EPQ[expert], after_EPQ[expert]) for expert in (0, 2)]
    assert found.worst_error == pytest.approx(max(each), rel=1e-4)
    assert found.worst_expert == (0, 2)[each.index(max(each))]
    assert min(each) <= found.error <= max(each)
    plain = measured(before_EPQ, after_EPQ, inputs, None)
    assert plain.error != found.error
    assert measured(before_EPQ, before_EPQ, inputs, None).error == 0
    one = measured(before_EPQ[:1], after_EPQ[:1], rows(ERROR_ROWS + 50), GRID)
    x_nQ = rows(ERROR_ROWS + 50)[0].x_nQ[:ERROR_ROWS]
    assert one.worst_expert is None
    assert one.error == pytest.approx(error(x_nQ, before_EPQ[0], after_EPQ[0]), rel=1e-4)


def test_the_table() -> None:
    tokens = {"target": 6, "routed": [0, 9, 3], "reserve": [2, 0, 1], "scored": [4, 0, 2]}
    moe = LayerReport(
        layer=1,
        matrices=[
            MatrixReport(name="self_attn.q_proj.weight", error=0.1),
            MatrixReport(name="mlp.experts.up", error=0.25),
        ],
        stream_error=0.5,
        router_agreement=0.875,
        tokens=tokens,
    )
    dense = LayerReport(layer=0, matrices=moe.matrices[:1], stream_error=0.0)
    report = QuantReport(layers=[dense, moe], bytes_before=8, bytes_after=2, calibration_tokens=4, reserve_tokens=4)
    lines = report.table()
    assert lines[2].split() == ["1", "0.1000", "0.2500", "0.5000", "87.5%", "0-9", "->", "6-9", "1"]
    assert lines[1].split() == ["0", "0.1000", "0.0000"]
    assert len({len(line) for line in lines}) == 1
    assert LayerReport.from_dict(report.to_dict()["layers"][1]) == moe
