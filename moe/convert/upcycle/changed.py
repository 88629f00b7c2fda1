"""Copies of an FFN of which a share of the neurons is changed: what Drop-Upcycling and noise upcycling have in common.

Legend: D model, F FFN width, n changed neurons.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.options import UpcycleOptions

# Takes the fp32 entries of the changed neurons in one matrix, (n, D) or (D, n), and gives what takes their place.
Change = Callable[[Tensor, torch.Generator], Tensor]


def num_changed(options: UpcycleOptions, width: int) -> int:
    """n = floor(r F)."""
    return math.floor(width * options.ratio + 1e-9)  # 0.29 * 100 is a little below 29


def change_neurons(ffn: DenseFFN, options: UpcycleOptions, random: torch.Generator, change: Change) -> DenseFFN:
    """A copy of ``ffn`` with n random neurons changed, in fp32, and rounded to the FFN's dtype.

    "shared" indices are the definition of Drop-Upcycling (arXiv 2502.19261): one set of neurons per expert, so that the others
    stay whole. "independent" is what its released code does: it shuffles the neurons, which changes nothing, and then draws a set
    for each matrix by itself, so that a neuron stays whole with probability (1 - r)^3.
    """
    width, num = ffn.width, num_changed(options, ffn.width)
    independent = options.indices == "independent"
    order_F = torch.randperm(width, generator=random) if independent else torch.arange(width)
    shared_n = torch.randperm(width, generator=random)[:num]

    def changed(weight: Tensor, dim: int) -> Tensor:
        fresh = weight.index_select(dim, order_F)
        if num:
            ids_n = torch.randperm(width, generator=random)[:num] if independent else shared_n
            entries = fresh.index_select(dim, ids_n).float()
            fresh.index_copy_(dim, ids_n, change(entries, random).to(fresh.dtype))
        return fresh

    return DenseFFN(
        gate_FD=None if ffn.gate_FD is None else changed(ffn.gate_FD, 0),
        up_FD=changed(ffn.up_FD, 0),
        down_DF=changed(ffn.down_DF, 1),
    )
