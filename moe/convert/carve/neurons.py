"""Activations of an FFN's neurons, over more tokens than their T x F matrix has room for.

Legend: T tokens, D model, F neurons.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.dense import DenseFFN

CHUNK = 4096  # tokens


def hidden(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """(T, F) activations: silu(x Wg) * (x Wu), or gelu(x Wu) of an FFN without gate."""
    up_TF = x_TD @ ffn.up_FD.T
    return F.gelu(up_TF) if ffn.gate_FD is None else F.silu(x_TD @ ffn.gate_FD.T).mul_(up_TF)


def chunks(num_tokens: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover the tokens."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def output(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """(T, D) output of the FFN, chunk by chunk."""
    return torch.cat([hidden(ffn, x_TD[chunk]) @ ffn.down_DF.T for chunk in chunks(len(x_TD))])


def energy(ffn: DenseFFN, x_TD: Tensor, weights_T: Tensor) -> Tensor:
    """(F,) weighted sum over tokens of h^2 |wd|^2: what is lost of the output without a neuron, were it alone."""
    sums_F = x_TD.new_zeros(ffn.width)
    for chunk in chunks(len(x_TD)):
        sums_F += weights_T[chunk] @ hidden(ffn, x_TD[chunk]).square_()
    return sums_F * ffn.down_DF.square().sum(0)
