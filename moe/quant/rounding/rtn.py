"""Round to nearest: each weight by itself, whatever reaches it.

Legend: P output rows, Q reduced columns, E matrices of one shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.quant.grids import Grid, Rounded
from moe.quant.inputs import Rows
from moe.quant.rounding.rounder import Rounder


class Nearest(Rounder):
    """The grid's own rounding."""

    def round_turned(
        self, weights_EPQ: Tensor, rows: Sequence[Rows], grid: Grid, stored: torch.dtype, affinity: bool
    ) -> Rounded:
        """See `Rounder`; rows are not looked at."""
        return grid.round(weights_EPQ, grid.scales(weights_EPQ, stored))
