"""Drop-Upcycling: a share of every expert's neurons is drawn anew (arXiv 2502.19261).

Replaced entries are normal with the mean and the deviation of what they replace, per matrix and expert. Experts then differ
from the start; the model does not equal the dense one, by design, except at ratio 0.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.changed import change_neurons, num_changed
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.options import UpcycleOptions


class Drop(Upcycler):
    """Experts are copies with redrawn neurons."""

    name = "drop"
    summary = (
        "Every expert is a copy of the dense FFN with a share of its neurons drawn anew from a normal distribution of the mean "
        "and deviation of what they replace (Drop-Upcycling, arXiv 2502.19261)."
    )
    uses = frozenset({"ratio", "indices"})

    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Where no neuron is redrawn."""
        return num_changed(options, width) == 0

    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """Neurons of each expert are drawn by itself."""
        for _ in range(options.num_experts):
            yield change_neurons(sources[0], options, random, redraw)


def redraw(entries: Tensor, random: torch.Generator) -> Tensor:
    """Normal entries of the same mean and (unbiased) deviation."""
    return torch.randn(entries.shape, generator=random).mul_(entries.std()).add_(entries.mean())
