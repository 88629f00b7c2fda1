"""Rounders against a slow reference, and what must hold whatever the rows are."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded
from moe.quant.inputs import Rows
from moe.quant.rounding import ROUNDERS
from moe.quant.rounding.clip import CLIPS, clipped_scales
from moe.quant.rounding.gptq import BLOCK, DAMPING, Gptq
from moe.quant.rounding.moments import energies, second_moments
from moe.quant.schemes import SCHEMES

P, Q = 24, 192
GRIDS: dict[str, Grid] = {
    "int4, groups": replace(SCHEMES["w4a16"].weights, group_size=64),
    "int3, groups of 32": replace(SCHEMES["w3a16"].weights, group_size=32),
    "int4 asymmetric": SCHEMES["w4a4"].weights,
    "int3 asymmetric, groups": replace(SCHEMES["w3a4"].weights, group_size=64),
    "int8": SCHEMES["w8a8"].weights,
    "fp8": SCHEMES["fp8"].weights,
    "mxfp4": SCHEMES["mxfp4"].weights,
}
rtn, clip, gptq = ROUNDERS["rtn"], ROUNDERS["clip"], ROUNDERS["gptq"]


def correlated(num_rows: int, seed: int = 0) -> Rows:
    """Rows of which a few directions have most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    mix_QQ = torch.randn(Q, Q, generator=generator) * torch.rand(Q, generator=generator) ** 3
    x_nQ = torch.randn(num_rows, Q, generator=generator) @ mix_QQ
    return Rows(x_nQ=x_nQ, weights_n=torch.rand(num_rows, generator=generator))


def weight(seed: int = 0) -> Tensor:
    return torch.randn(P, Q, generator=torch.Generator().manual_seed(100 + seed)) * 0.1


def output_error(rounded: Rounded, weight_PQ: Tensor, rows: Rows) -> float:
    return float((rows.x_nQ @ (rounded.dequantize() - weight_PQ).T).square().sum())


def expected_moments(x_nQ: Tensor) -> Tensor:
    """From the definition, with the mean of the diagonal as the unit; float64."""
    x_nQ = x_nQ.double()
    full_QQ = x_nQ.T @ x_nQ
    diagonal_QQ = torch.diag(full_QQ.diagonal())
    trust = len(x_nQ) / (len(x_nQ) + Q)
    return (trust * full_QQ + (1 - trust) * diagonal_QQ) / full_QQ.diagonal().mean()


def reference(weight_PQ: Tensor, x_nQ: Tensor, grid: Grid) -> Tensor:
    """(P, Q) GPTQ in float64, from what it is for: each column's error is made up for by the best change of all that are left.

    With column j off by e, the change d of the columns R that are left which minimises the error |(e, d) L|^2, H = L L^T, is
    -e H_jR H_RR^-1. It is solved anew for each column, without a Cholesky factor, blocks, or updates in bulk.
    """
    moments_QQ = expected_moments(x_nQ)
    left = [int(column) for column in moments_QQ.diagonal().argsort(descending=True)]
    moments_QQ += DAMPING * torch.eye(Q, dtype=torch.float64)
    scales = clipped_scales(
        weight_PQ[None], energies(Rows(x_nQ=x_nQ, weights_n=x_nQ[:, 0]), False)[None], grid, torch.float32
    )
    left_PQ, out_PQ = weight_PQ.double().clone(), torch.zeros(P, Q, dtype=torch.float64)
    while left:
        column = left.pop(0)
        group = column // (grid.group_size or Q)
        scale_P1 = scales.scale[0, :, group, None]
        zero_P1 = None if scales.zero is None else scales.zero[0, :, group, None]
        code_P1 = grid.encode(left_PQ[:, column, None].float(), scale_P1, zero_P1)
        out_PQ[:, column, None] = grid.decode(code_P1, scale_P1, zero_P1).double()
        if left:
            # What is left is moved by -d, so that the outputs stay.
            move_R = torch.linalg.solve(moments_QQ[left][:, left], moments_QQ[left, column])
            left_PQ[:, left] += (left_PQ[:, column] - out_PQ[:, column])[:, None] * move_R
    return out_PQ


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_the_slow_reference(name: str) -> None:
    rows, weight_PQ = correlated(400), weight()
    got_PQ = gptq.round_matrix(weight_PQ, rows, GRIDS[name]).dequantize().double()
    expected_PQ = reference(weight_PQ, rows.x_nQ, GRIDS[name])
    # A value that is nearly half-way between codes may fall to the other side in fp32, and moves those after it in its row.
    same_P = torch.isclose(got_PQ, expected_PQ, rtol=1e-4, atol=1e-6).all(-1)
    assert same_P.float().mean() >= 0.9, f"{int(same_P.sum())} of {P} rows agree"


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_rtn_on_correlated_rows(name: str) -> None:
    rows, held_out, weight_PQ = correlated(2000), correlated(500), weight()
    held_out = Rows(x_nQ=correlated(2500).x_nQ[2000:], weights_n=held_out.weights_n)
    ours, plain = gptq.round_matrix(weight_PQ, rows, GRIDS[name]), rtn.round_matrix(weight_PQ, rows, GRIDS[name])
    assert output_error(ours, weight_PQ, rows) < 0.9 * output_error(plain, weight_PQ, rows)
    assert output_error(ours, weight_PQ, held_out) < 0.95 * output_error(plain, weight_PQ, held_out)


@pytest.mark.parametrize("name", GRIDS)
def test_without_rows_gptq_rounds_to_nearest_on_clipped_ranges(name: str) -> None:
    rows, weight_PQ = correlated(0), weight()
    ours, plain = (rounder.round_matrix(weight_PQ, rows, GRIDS[name]) for rounder in (gptq, clip))
    assert torch.equal(ours.dequantize(), plain.dequantize())
    assert torch.equal(ours.codes.float(), plain.codes.float()) and ours.codes.dtype == plain.codes.dtype


def test_dead_columns_are_rounded_to_nearest() -> None:
    grid, weight_PQ = GRIDS["int4 asymmetric"], weight()
    x_nQ = correlated(300).x_nQ
    x_nQ[:, 10:40] = 0
    rows = Rows(x_nQ=x_nQ, weights_n=torch.ones(300))
    ours, plain = gptq.round_matrix(weight_PQ, rows, grid), clip.round_matrix(weight_PQ, rows, grid)
    assert torch.equal(ours.codes[:, 10:40], plain.codes[:, 10:40])
    assert not torch.equal(ours.codes, plain.codes)


@pytest.mark.parametrize("num_rows", [1, 4, 20, 60])
def test_few_rows_do_no_harm_on_others(num_rows: int) -> None:
    rows, weight_PQ = correlated(3000), weight()
    few = Rows(x_nQ=rows.x_nQ[:num_rows], weights_n=rows.weights_n[:num_rows])
    for name, grid in GRIDS.items():
        ours, plain = gptq.round_matrix(weight_PQ, few, grid), rtn.round_matrix(weight_PQ, few, grid)
        assert output_error(ours, weight_PQ, few) < output_error(plain, weight_PQ, few), name
        assert output_error(ours, weight_PQ, rows) < 1.02 * output_error(plain, weight_PQ, rows), name


def test_equal_columns_make_the_hessian_singular() -> None:
    x_nQ = correlated(500).x_nQ
    x_nQ[:, 1::2] = x_nQ[:, ::2]
    rows = Rows(x_nQ=x_nQ * 1e4, weights_n=torch.ones(500))
    ours = gptq.round_matrix(weight(), rows, GRIDS["int8"])
    assert bool(ours.dequantize().isfinite().all())
    assert output_error(ours, weight(), rows) < output_error(
        rtn.round_matrix(weight(), rows, GRIDS["int8"]), weight(), rows
    )


def test_order_of_rows_does_not_matter() -> None:
    # Whole numbers are added without rounding.
    x_nQ = torch.randint(-8, 9, (300, Q), generator=torch.Generator().manual_seed(1)).float()
    x_nQ[:, 1:] += x_nQ[:, :1]
    order_n = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    weights_n = torch.randint(1, 5, (300,)).float()
    for affinity in (False, True):
        one, other = (
            gptq.round_matrix(
                weight(), Rows(x_nQ=x_nQ[order], weights_n=weights_n[order]), GRIDS["mxfp4"], affinity=affinity
            )
            for order in (torch.arange(300), order_n)
        )
        assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("name", GRIDS)
def test_output_rows_and_experts_are_independent(name: str) -> None:
    grid = GRIDS[name]
    rows = [correlated(300), correlated(0), correlated(50, seed=1)]
    weights_EPQ = torch.stack([weight(seed) for seed in range(3)])
    stack = gptq.round_stack(weights_EPQ, rows, grid)
    assert stack.codes.shape == weights_EPQ.shape
    for expert in range(3):
        alone = gptq.round_matrix(weights_EPQ[expert], rows[expert], grid)
        assert torch.equal(stack.codes[expert].float(), alone.codes.float())
        assert torch.equal(stack.scales.scale[expert], alone.scales.scale)
    part = gptq.round_matrix(weights_EPQ[0, 5:9], rows[0], grid)
    assert torch.equal(part.codes.float(), stack.codes[0, 5:9].float())


def test_experts_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [correlated(100, seed) for seed in range(5)]
    weights_EPQ = torch.stack([weight(seed) for seed in range(5)])
    whole = gptq.round_stack(weights_EPQ, rows, GRIDS["int3 asymmetric, groups"])
    monkeypatch.setattr("moe.quant.rounding.gptq._FACTOR_BYTES", 2 * 4 * Q * Q)
    parts = gptq.round_stack(weights_EPQ, rows, GRIDS["int3 asymmetric, groups"])
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales.scale, parts.scales.scale)
    assert whole.scales.zero is not None and parts.scales.zero is not None
    assert torch.equal(whole.scales.zero, parts.scales.zero)


def test_affinity_favours_tokens_with_large_weights() -> None:
    grid, weight_PQ = GRIDS["int3, groups of 32"], weight()
    first, second = correlated(300), correlated(300, seed=5)
    x_nQ, weights_n = torch.cat((first.x_nQ, second.x_nQ)), torch.ones(600)
    weights_n[300:] = 0.01
    both = Rows(x_nQ=x_nQ, weights_n=weights_n)
    plain = gptq.round_matrix(weight_PQ, both, grid)
    weighted = gptq.round_matrix(weight_PQ, both, grid, affinity=True)
    assert output_error(weighted, weight_PQ, first) < 0.95 * output_error(plain, weight_PQ, first)


def test_moments_and_energies() -> None:
    rows = correlated(300)
    torch.testing.assert_close(second_moments(rows, affinity=False), expected_moments(rows.x_nQ), rtol=1e-4, atol=1e-5)
    trust = 300 / (300 + Q)
    mean_Q = rows.x_nQ.square().mean(0)
    torch.testing.assert_close(energies(rows, affinity=False), trust * mean_Q / mean_Q.mean() + 1 - trust)
    # Rows of weight 0 are as if they were not there, and equal weights as if there were none.
    weights_n = torch.zeros(300)
    weights_n[:100] = 0.5
    some = Rows(x_nQ=rows.x_nQ, weights_n=weights_n)
    torch.testing.assert_close(second_moments(some, True), expected_moments(rows.x_nQ[:100]), rtol=1e-4, atol=1e-5)
    none = correlated(0)
    assert torch.equal(second_moments(none, True), torch.eye(Q, dtype=torch.float64))
    assert torch.equal(energies(none, True), torch.ones(Q))
    assert torch.equal(second_moments(Rows(x_nQ=rows.x_nQ * 0, weights_n=weights_n * 0), True), torch.eye(Q).double())


@pytest.mark.parametrize("name", ["int4, groups", "int3 asymmetric, groups", "mxfp4"])
def test_clipped_scales_are_the_best_of_each_group(name: str) -> None:
    grid, weight_PQ, energy_Q = GRIDS[name], weight()[:3], correlated(50).x_nQ.square().mean(0)
    weight_PQ[:, ::32] *= 3
    scales = clipped_scales(weight_PQ[None], energy_Q[None], grid, torch.float32)
    size = grid.group_size or Q
    chosen = set()
    for row in range(3):
        for group in range(Q // size):
            part = slice(group * size, (group + 1) * size)
            tried = [grid.scales(weight_PQ[row : row + 1, part], clip=ratio) for ratio in CLIPS]
            errors = [
                float(
                    (grid.round(weight_PQ[row : row + 1, part], one).dequantize() - weight_PQ[row, part]).square()
                    @ energy_Q[part]
                )
                for one in tried
            ]
            best = tried[errors.index(min(errors))]
            assert torch.equal(scales.scale[0, row, group], best.scale[0, 0])
            chosen.add(errors.index(min(errors)))
    assert len(chosen) > 1


def test_scales_are_stored_before_codes_are_chosen() -> None:
    for rounder in ROUNDERS.values():
        rounded = rounder.round_matrix(weight(), correlated(200), GRIDS["int4, groups"], stored=torch.bfloat16)
        scale = rounded.scales.scale
        assert torch.equal(scale, scale.bfloat16().float())
        assert not torch.equal(
            scale, rounder.round_matrix(weight(), correlated(200), GRIDS["int4, groups"]).scales.scale
        )


def test_weights_are_not_changed_and_may_be_bf16() -> None:
    weight_PQ = weight().bfloat16()
    before = weight_PQ.clone()
    for rounder in ROUNDERS.values():
        rounded = rounder.round_matrix(weight_PQ, correlated(200), GRIDS["int4 asymmetric"])
        assert torch.equal(weight_PQ, before)
        assert rounded.dequantize().dtype == torch.float32


def test_rows_that_are_not_finite_are_noticed() -> None:
    rows = correlated(200)
    rows.x_nQ[3, 3] = float("inf")
    with pytest.raises(AssertionError, match="not finite"):
        gptq.round_matrix(weight(), rows, GRIDS["int8"])


def test_blocks_are_shorter_than_the_matrices_here() -> None:
    assert BLOCK < Q and isinstance(gptq, Gptq)  # else lazy updates would not be tested
