"""Sparse upcycling: every expert is a copy of the dense FFN (arXiv 2212.05055).

The model equals the dense one as long as a token's weights sum to 1, whatever the gate says. Equal experts differ in their
gradients by their weights and tokens alone, which come from the random gate.
"""

from collections.abc import Iterator, Sequence

import torch

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.options import UpcycleOptions


class Copy(Upcycler):
    """Experts are copies."""

    name = "copy"
    summary = "Every expert is a copy of the dense FFN (Sparse Upcycling, arXiv 2212.05055)."

    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Always."""
        return True

    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """The same FFN, E times."""
        yield from [sources[0]] * options.num_experts
