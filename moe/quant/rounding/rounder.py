"""What a rounding method is.

Legend: P output rows, Q reduced columns, E matrices of one shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.inputs import Rows


class Rounder(ABC):
    """Chooses the codes of matrices, given what they see."""

    @abstractmethod
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
