"""Rounding to nearest with narrower ranges, where a few large weights cost the others more than they are worth.

Each group of each row takes the ratio of its range with the least squared error, columns weighted by the mean square of their
inputs. This is the second part of AWQ (Lin et al., arXiv 2306.00978), which takes the error of products with sample rows instead.

Legend: E matrices of one shape, P output rows, Q reduced columns, G groups, g columns of a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.inputs import Rows
from moe.quant.rounding.moments import energies
from moe.quant.rounding.rounder import Rounder

CLIPS = tuple(1 - step / 20 for step in range(11))
_CHUNK = 1 << 20  # weights at a time; with larger temporaries a CPU is ten times slower


class Clipped(Rounder):
    """See the module."""

    @torch.no_grad()
    def round_turned(
        self, weights_EPQ: Tensor, rows: Sequence[Rows], grid: Grid, stored: torch.dtype, affinity: bool
    ) -> Rounded:
        """See `Rounder`."""
        energy_EQ = torch.stack([energies(rows[index], affinity) for index in range(len(rows))])
        return grid.round(weights_EPQ, clipped_scales(weights_EPQ, energy_EQ, grid, stored))


def clipped_scales(weights_EPQ: Tensor, energy_EQ: Tensor, grid: Grid, stored: torch.dtype) -> Scales:
    """Scales of the ratios with the least error; of equal ones the widest.

    Args:
        weights_EPQ: floating and finite.
        energy_EQ: weights of the columns' squared errors.
        grid: of the weights.
        stored: dtype of the scales in a checkpoint.
    """
    at_once = max(1, _CHUNK // weights_EPQ.shape[-1])
    parts = [
        _best(rows_pQ.float(), energy_Q, grid, stored)
        for weight_PQ, energy_Q in zip(weights_EPQ, energy_EQ, strict=True)
        for rows_pQ in weight_PQ.split(at_once)
    ]
    zeros = [part.zero for part in parts if part.zero is not None]
    num_experts, num_rows = weights_EPQ.shape[:2]
    scale_EPG = torch.cat([part.scale for part in parts]).unflatten(0, (num_experts, num_rows))
    return Scales(scale=scale_EPG, zero=torch.cat(zeros).view_as(scale_EPG) if zeros else None)


def _best(weight_PQ: Tensor, energy_Q: Tensor, grid: Grid, stored: torch.dtype) -> Scales:
    groups_PGg, energy_Gg = grid.grouped(weight_PQ), grid.grouped(energy_Q)
    best = grid.scales(weight_PQ, stored)
    least_PG = _errors(grid, groups_PGg, energy_Gg, best)
    for clip in CLIPS[1:]:
        scales = grid.scales(weight_PQ, stored, clip)
        error_PG = _errors(grid, groups_PGg, energy_Gg, scales)
        better_PG = error_PG < least_PG
        least_PG = torch.where(better_PG, error_PG, least_PG)
        zero = best.zero if scales.zero is None or best.zero is None else torch.where(better_PG, scales.zero, best.zero)
        best = Scales(scale=torch.where(better_PG, scales.scale, best.scale), zero=zero)
    return best


def _errors(grid: Grid, groups_PGg: Tensor, energy_Gg: Tensor, scales: Scales) -> Tensor:
    """(P, G) weighted squared errors of rounding to nearest."""
    scale, zero = scales.scale[..., None], None if scales.zero is None else scales.zero[..., None]
    wrong_PGg = grid.decode(grid.encode(groups_PGg, scale, zero), scale, zero) - groups_PGg
    return (wrong_PGg.square() * energy_Gg).sum(-1)
