"""What a rounding method is.

Legend: P output rows, Q reduced columns, E matrices of one shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.inputs import Rows


class Rounder(ABC):
    """Chooses the codes of matrices, given what they see."""

    def round_stack(
        self,
        weights_EPQ: Tensor,
        rows: Sequence[Rows],
        grid: Grid,
        *,
        stored: torch.dtype = torch.float32,
        affinity: bool = False,
    ) -> Rounded:
        """Round E matrices of one shape, each by its own rows.

        Args:
            weights_EPQ: floating and finite.
            rows: of each matrix; some may have none.
            grid: to round to.
            stored: dtype of the scales in a checkpoint.
            affinity: rows count by their combine weights (MoEQuant, arXiv 2505.03804) in methods that look at rows.
        """
        turned = _Turned(rows, grid) if grid.rotated else rows
        return self.round_turned(grid.turn(weights_EPQ), turned, grid, stored, affinity)

    @abstractmethod
    def round_turned(
        self, weights_EPQ: Tensor, rows: Sequence[Rows], grid: Grid, stored: torch.dtype, affinity: bool
    ) -> Rounded:
        """`round_stack` of weights and rows that are rotated already, where the grid is."""

    def round_matrix(
        self,
        weight_PQ: Tensor,
        rows: Rows,
        grid: Grid,
        *,
        stored: torch.dtype = torch.float32,
        affinity: bool = False,
    ) -> Rounded:
        """Round one matrix (P, Q); see `round_stack`."""
        stack = self.round_stack(weight_PQ[None], [rows], grid, stored=stored, affinity=affinity)
        zero = None if stack.scales.zero is None else stack.scales.zero[0]
        return Rounded(codes=stack.codes[0], scales=Scales(scale=stack.scales.scale[0], zero=zero), grid=grid)


class _Turned(Sequence[Rows]):
    """Rows as a rotated grid sees them, made when they are asked for."""

    def __init__(self, rows: Sequence[Rows], grid: Grid) -> None:
        self._rows, self._grid = rows, grid

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Rows: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Rows]: ...
    def __getitem__(self, index: int | slice) -> Rows | Sequence[Rows]:
        found = self._rows[index]
        if isinstance(found, Rows):
            return Rows(x_nQ=self._grid.turn(found.x_nQ), weights_n=found.weights_n)
        return _Turned(found, self._grid)
