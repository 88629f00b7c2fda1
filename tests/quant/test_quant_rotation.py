"""Rotated grids: the same products, smaller errors where one channel stands out."""

from dataclasses import replace

import pytest
import torch

from moe.quant.grids import ROTATION, IntGrid, hadamard
from moe.quant.inputs import Rows
from moe.quant.options import QuantOptions
from moe.quant.rounding import ROUNDERS

GRID = IntGrid(bits=4, symmetric=False, rotated=True)
PLAIN = replace(GRID, rotated=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_h_is_its_own_inverse(size: int) -> None:
    h = hadamard(size)
    torch.testing.assert_close(h @ h, torch.eye(size))
    assert torch.equal(h, h.T) and torch.equal(h.abs(), torch.full_like(h, size**-0.5))


@pytest.mark.parametrize("width", [576, 192, 96, 15])
def test_products_stay(width: int) -> None:
    """Blocks are the largest power of two, up to 128, that divides the width; an odd one is left alone."""
    x_TQ, weight_PQ = normal(5, width), normal(7, width, seed=1)
    turned_TQ = GRID.turn(x_TQ)
    torch.testing.assert_close(turned_TQ @ GRID.turn(weight_PQ).T, x_TQ @ weight_PQ.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(GRID.turn(turned_TQ), x_TQ)
    assert torch.equal(turned_TQ, x_TQ) == (width == 15)
    unit_Q = torch.zeros(width)
    unit_Q[0] = 1
    assert int((GRID.turn(unit_Q) != 0).sum()) == {576: 64, 192: 64, 96: 32, 15: 1}[width] <= ROTATION


def test_nearest_and_simulate_are_rounding_in_the_rotated_space() -> None:
    x_TQ = normal(5, 64)
    expected_TQ = PLAIN.nearest(x_TQ @ hadamard(64)).dequantize() @ hadamard(64)
    torch.testing.assert_close(GRID.simulate(x_TQ), expected_TQ)
    torch.testing.assert_close(GRID.nearest(x_TQ).dequantize(), expected_TQ)
    assert GRID.simulate(x_TQ.bfloat16()).dtype == torch.bfloat16


def test_an_outlier_costs_the_others_less() -> None:
    x_TQ = normal(50, 64)
    x_TQ[:, 3] *= 50
    errors = [float((grid.simulate(x_TQ) - x_TQ).square().mean()) for grid in (GRID, PLAIN)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("method", ROUNDERS)
def test_rounders_work_in_the_rotated_space(method: str) -> None:
    """On turned weights and rows a plain grid chooses the same codes, for each expert of a stack."""
    weights_EPQ = normal(3, 6, 64)
    rows = [
        Rows(x_nQ=normal(40, 64, seed=2 + e) * torch.linspace(0.1, 3, 64), weights_n=torch.ones(40)) for e in range(3)
    ]
    turned = [Rows(x_nQ=one.x_nQ @ hadamard(64), weights_n=one.weights_n) for one in rows]
    got = ROUNDERS[method].round_stack(weights_EPQ, rows, GRID)
    expected = ROUNDERS[method].round_stack(weights_EPQ @ hadamard(64), turned, PLAIN)
    assert (got.codes != expected.codes).float().mean() < 0.01  # products of other sizes round otherwise
    torch.testing.assert_close(got.scales.scale, expected.scales.scale)
    single = ROUNDERS[method].round_matrix(weights_EPQ[1], rows[1], GRID)
    assert (single.codes != got.codes[1]).float().mean() < 0.01
    error = (got.dequantize() - weights_EPQ).norm() / weights_EPQ.norm()
    assert error < 0.3


def test_schemes_for_servers_do_not_rotate() -> None:
    scheme = QuantOptions(scheme="w3a4", rotate=True).resolved()
    assert scheme.weights.rotated and scheme.activations is not None and scheme.activations.rotated
    with pytest.raises(ValueError, match=r"--rotate .* --scheme w4a16 .* use it with w4a4, w3a4"):
        QuantOptions(scheme="w4a16", rotate=True).resolved()
