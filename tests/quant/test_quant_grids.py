"""Grids: nearest is nearest, the scales are those of compressed-tensors, and nothing is ever infinite."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.quant.grids import E2M1, FP8, Fp8Grid, Grid, IntGrid, Mxfp4Grid

GRIDS: list[Grid] = [
    *(IntGrid(bits=bits, symmetric=symmetric, group_size=4) for bits in (3, 4, 8) for symmetric in (True, False)),
    IntGrid(bits=4),
    Fp8Grid(),
    Mxfp4Grid(group_size=4),
]
STORED = (torch.float32, torch.bfloat16, torch.float16)
# Ordinary numbers, zeros, subnormals and numbers close to the largest.
FINITE = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 3e-39, 1e-8, 65504.0, -3e38, 3.4e38]),
)
MATRICES = st.lists(FINITE, min_size=8, max_size=8).map(lambda values: torch.tensor(values).view(1, 8))
cases = [
    pytest.param(
        grid, stored, id=f"{type(grid).__name__}-{getattr(grid, 'bits', '')}-{i}-{stored}".replace("torch.", "")
    )
    for i, grid in enumerate(GRIDS)
    for stored in STORED
]


def all_codes(grid: Grid) -> Tensor:
    """Every code that stands for a number."""
    if isinstance(grid, IntGrid):
        return torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).to(torch.int8)
    if isinstance(grid, Mxfp4Grid):
        return torch.arange(16, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8)
    return codes[codes.float().isfinite()]


@pytest.mark.parametrize(("grid", "stored"), cases)
@settings(max_examples=25, deadline=None)
@given(values=MATRICES)
def test_codes_are_nearest_and_finite(grid: Grid, stored: torch.dtype, values: Tensor) -> None:
    rounded = grid.nearest(values, stored)
    scale = rounded.scales.scale
    assert (scale > 0).all() and scale.isfinite().all()
    if not isinstance(grid, Mxfp4Grid):  # stored as exponents
        assert torch.equal(scale.to(stored).float(), scale)
    got = rounded.dequantize()
    assert got.isfinite().all()
    if isinstance(grid, IntGrid) and rounded.scales.zero is not None:
        assert (grid.encode(rounded.scales.zero, torch.ones(()), None) == rounded.scales.zero).all(), "no code"
    zero = None if rounded.scales.zero is None else rounded.scales.zero[..., None, None]
    levels = grid.decode(all_codes(grid), scale[..., None, None], zero).double()  # (1, G, 1, codes)
    error = (levels - grid.grouped(values)[..., None].double()).abs().amin(-1).flatten(-2)
    step = scale.double().repeat_interleave(8 // scale.shape[-1], -1)
    # Quotients are computed in fp32, which moves the middle between two codes a little.
    bound = error + 1e-6 * (values.double().abs() + step)
    assert ((got.double() - values.double()).abs() <= bound).all()


@pytest.mark.parametrize(("grid", "stored"), cases)
@settings(max_examples=15, deadline=None)
@given(values=MATRICES)
def test_rounding_twice_changes_nothing(grid: Grid, stored: torch.dtype, values: Tensor) -> None:
    rounded = grid.nearest(values, stored)
    again = grid.round(rounded.dequantize(), rounded.scales)
    assert torch.equal(again.dequantize(), rounded.dequantize())


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_zeros_stay_zeros(grid: Grid) -> None:
    assert torch.equal(grid.nearest(torch.zeros(3, 64)).dequantize(), torch.zeros(3, 64))
    half = torch.zeros(1, 64)
    half[0, 32:] = torch.linspace(-1, 1, 32)
    assert not grid.nearest(half).dequantize()[0, :32].any()


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(E2M1)]
    codes = Mxfp4Grid().encode(torch.tensor(middles), torch.ones(()), None)
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert Mxfp4Grid().encode(-torch.tensor(middles), torch.ones(()), None).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_the_power_of_two_of_mxfp4() -> None:
    """4 to 7 keep the scale 1, of which 6 is the largest level; from 7 on it doubles. A group of zeros has a normal scale."""
    most = torch.tensor([4.0, 6.0, 6.999, 7.0, 7.999, 8.0, 0.0, 1e-45])
    groups = torch.zeros(8, 32)
    groups[:, 5] = -most
    assert Mxfp4Grid().scales(groups).scale[:, 0].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 2.0**-126]


PRESETS: dict[str, Grid] = {
    "W8A16": IntGrid(bits=8, group_size=32),
    "W4A16": IntGrid(bits=4, group_size=32),
    "W3A16": IntGrid(bits=3, group_size=32),
    "W4A16_ASYM": IntGrid(bits=4, symmetric=False, group_size=32),
    "W8A8": IntGrid(bits=8),
    "FP8_DYNAMIC": Fp8Grid(),
    "MXFP4A16": Mxfp4Grid(),
}


def arguments(preset: str, part: str, group_size: int | None) -> Any:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    values = getattr(preset_name_to_scheme(preset, ["Linear"]), part).model_dump()
    return QuantizationArgs(**(values | ({"group_size": group_size} if values["strategy"] == "group" else {})))


@pytest.mark.parametrize("preset", PRESETS)
def test_scales_and_codes_are_those_of_the_package(preset: str) -> None:
    """In fp32; in bf16 the package rounds quotients before it rounds them to codes."""
    grid = PRESETS[preset]
    args = arguments(preset, "weights", grid.group_size)
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    values = torch.randn(64, 128) * torch.logspace(-6, 4, 64)[:, None] + 0.01
    groups = grid.grouped(values)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    rounded = grid.nearest(values)
    assert torch.equal(rounded.scales.scale, scale)
    assert rounded.scales.zero is None or torch.equal(rounded.scales.zero, zero.float())
    assert torch.equal(rounded.dequantize(), fake_quantize(values, scale, zero, args))


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC"])
def test_activations_are_rounded_as_in_the_package(preset: str) -> None:
    args = arguments(preset, "input_activations", None)
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    x_BLD = torch.randn(2, 7, 64) * torch.logspace(-3, 3, 7)[:, None]
    scale, zero = compute_dynamic_scales_and_zp(x_BLD, args, torch.nn.Module())
    assert torch.equal(PRESETS[preset].simulate(x_BLD), fake_quantize(x_BLD, scale, zero, args))


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if not isinstance(grid, Mxfp4Grid)], ids=repr)
def test_what_is_beyond_a_scale_becomes_the_largest_code(grid: Grid) -> None:
    """fp16 holds no scale for such values."""
    values = torch.linspace(-3, 3, 8).view(1, 8) * 1e38
    rounded = grid.nearest(values, torch.float16)
    assert rounded.scales.scale.unique().item() == torch.finfo(torch.float16).max
    got = rounded.dequantize()
    assert got.isfinite().all() and (got.abs() < 65504 * 450).all() and (got[0, 4:] > 0).any()


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"group_size=128 does not divide the 192 columns of up_proj; use --group-size 64"
    ):
        IntGrid(bits=4, group_size=128).check(192, "up_proj")
    with pytest.raises(ValueError, match="use a scale per row"):
        IntGrid(bits=4, group_size=32).check(7, "up_proj")
