"""Noise upcycling: normal noise is added to a share of every expert's neurons.

A baseline of the code of Drop-Upcycling (arXiv 2502.19261), whose noise has deviation 0.02 and whose share is a half.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.changed import change_neurons, num_changed
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.options import UpcycleOptions


class Noise(Upcycler):
    """Experts are copies with noise on some neurons."""

    name = "noise"
    summary = (
        "Every expert is a copy of the dense FFN with normal noise on a share of its neurons (noise upcycling, a baseline of "
        "arXiv 2502.19261)."
    )
    uses = frozenset({"ratio", "indices", "noise_std"})

    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Where no neuron gets noise."""
        return num_changed(options, width) == 0 or options.noise_std == 0

    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """Neurons and noise of each expert are drawn by itself."""

        def add_noise(entries: Tensor, random: torch.Generator) -> Tensor:
            return torch.randn(entries.shape, generator=random).mul_(options.noise_std).add_(entries)

        for _ in range(options.num_experts):
            yield change_neurons(sources[0], options, random, add_noise)
