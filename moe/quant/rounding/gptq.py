"""GPTQ: columns are rounded one after another, and what is not rounded yet makes up for the errors so far.

GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) minimises |X (W - What)^T|^2 for the rows X that reach a matrix. With the
damped second moments H of X (`moments`) and U the upper Cholesky factor of its inverse, column j is rounded to nearest, its error
divided by U_jj is spread over the columns after it by row j of U, in blocks whose effect on later blocks is one product.

Scales are chosen before, with clipped ranges (`clip`), so that columns can be taken in any order and servers need not know it:
those with the largest inputs come first, as in the released code's ``act-order`` with ``static-groups``. On experts of a carved
SmolLM2 this had less error on other text than scales found anew when a group's turn comes, at each of w4a16, w3a16, w3a4 and mxfp4.

Experts of one layer have equal shapes: they go through the columns together, each with its own H and order.

Legend: E matrices of one shape, P output rows, Q reduced columns, G groups, b columns of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.inputs import Rows
from moe.quant.rounding.clip import clipped_scales
from moe.quant.rounding.moments import energies, second_moments
from moe.quant.rounding.rounder import Rounder

BLOCK = 128  # columns between lazy updates, as in the paper
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
_FACTOR_BYTES = 1 << 29  # of the factors that are held at a time


class Gptq(Rounder):
    """See the module."""

    @torch.no_grad()
    def round_turned(
        self, weights_EPQ: Tensor, rows: Sequence[Rows], grid: Grid, stored: torch.dtype, affinity: bool
    ) -> Rounded:
        """See `Rounder`."""
        assert len(weights_EPQ) == len(rows)
        num_columns = weights_EPQ.shape[-1]
        at_once = max(1, _FACTOR_BYTES // (4 * num_columns**2))
        parts = []
        for start in range(0, len(rows), at_once):
            some_EPQ = weights_EPQ[start : start + at_once].float()
            spreads, energy = [], []
            for index in range(start, start + len(some_EPQ)):
                seen = rows[index]  # made when it is asked for
                spreads.append(spread_of(second_moments(seen, affinity)))
                energy.append(energies(seen, affinity))
            scales = clipped_scales(some_EPQ, torch.stack(energy), grid, stored)
            parts.append(Rounded(codes=_codes(some_EPQ, spreads, scales, grid), scales=scales, grid=grid))
        return _joined(parts)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How errors of columns spread.

    Attributes:
        order_Q: int64 columns in the order in which they are rounded.
        factor_QQ: fp32 upper U, rows and columns in that order.
    """

    order_Q: Tensor
    factor_QQ: Tensor


def spread_of(moments_QQ: Tensor) -> Spread:
    """Of second moments (float64) with a mean of 1 on the diagonal; damping grows until rounding errors leave a factor."""
    order_Q = moments_QQ.diagonal().argsort(descending=True, stable=True)
    damped_QQ = moments_QQ[order_Q][:, order_Q]
    damping = DAMPING
    while True:
        damped_QQ.diagonal().add_(damping)
        lower_QQ, failed = torch.linalg.cholesky_ex(damped_QQ)
        if not failed:
            upper_QQ, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_QQ), upper=True)
            if not failed:
                return Spread(order_Q=order_Q, factor_QQ=upper_QQ.float())
        damping *= 10


def _codes(weights_EPQ: Tensor, spreads: list[Spread], scales: Scales, grid: Grid) -> Tensor:
    """(E, P, Q) codes by algorithm 1; columns are contiguous rows here."""
    num_experts, num_rows, num_columns = weights_EPQ.shape
    order_EQ, factor_EQQ = (
        torch.stack([one.order_Q for one in spreads]),
        torch.stack([one.factor_QQ for one in spreads]),
    )
    left_EQP = weights_EPQ.mT.gather(1, order_EQ[..., None].expand(-1, -1, num_rows))
    group_EQ = order_EQ // (grid.group_size or num_columns)
    scale_EGP, zero_EGP = scales.scale.mT, None if scales.zero is None else scales.zero.mT
    experts_E = torch.arange(num_experts, device=order_EQ.device)
    codes = []
    for start in range(0, num_columns, BLOCK):
        stop = min(start + BLOCK, num_columns)
        errors_EbP = torch.empty_like(left_EQP[:, start:stop])
        for column in range(start, stop):
            column_EP, group_E = left_EQP[:, column], group_EQ[:, column]
            scale_EP = scale_EGP[experts_E, group_E]
            zero_EP = None if zero_EGP is None else zero_EGP[experts_E, group_E]
            codes.append(grid.encode(column_EP, scale_EP, zero_EP))
            error_EP = column_EP - grid.decode(codes[-1], scale_EP, zero_EP)
            error_EP /= factor_EQQ[:, column, column, None]
            errors_EbP[:, column - start] = error_EP
            spread_Eb = factor_EQQ[:, column, column + 1 : stop]
            left_EQP[:, column + 1 : stop].addcmul_(spread_Eb[..., None], error_EP[:, None], value=-1)
        left_EQP[:, stop:].baddbmm_(factor_EQQ[:, start:stop, stop:].mT, errors_EbP, alpha=-1)
    in_order_EPQ = torch.stack(codes, -1)
    places_EQ = order_EQ.argsort(-1)[:, None].expand(-1, num_rows, -1)
    # Bytes, since float8 cannot be gathered.
    return in_order_EPQ.view(torch.uint8).gather(-1, places_EQ).view(in_order_EPQ.dtype)


def _joined(parts: list[Rounded]) -> Rounded:
    zeros = [part.scales.zero for part in parts if part.scales.zero is not None]
    scale_EPG = torch.cat([part.scales.scale for part in parts])
    return Rounded(
        codes=torch.cat([part.codes for part in parts]),
        scales=Scales(scale=scale_EPG, zero=torch.cat(zeros) if zeros else None),
        grid=parts[0].grid,
    )
