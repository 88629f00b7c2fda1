"""Rounded matrices as the weights that kernels multiply by.

Kernels know integers of 4 and 8 bits. Fewer bits are stored as 4; e2m1 (mxfp4) is twice a whole number from -12 to 12, for which 4
bits are too few, so it becomes 8-bit codes with half the scale. Both are exact.

Legend: P output rows, Q reduced columns, G groups of Q.
"""

import torch
from torch import Tensor

from moe.kernels.quantized import NUM_BITS, QuantizedWeight, pack_int32
from moe.quant.grids import Grid, IntGrid, Mxfp4Grid, Rounded
from moe.quant.schemes import Scheme


def is_packable(scheme: Scheme) -> bool:
    """Whether a scheme's products are those of a packed weight and ordinary activations."""
    return scheme.activations is None and isinstance(scheme.weights, IntGrid | Mxfp4Grid)


def kernel_scheme(grid: Grid) -> str:
    """Name of the kernels' scheme that holds a grid's codes."""
    num_bits = grid.num_bits if isinstance(grid, IntGrid) else 8
    return next(name for name, bits in NUM_BITS.items() if num_bits <= bits)


def pack(rounded: Rounded) -> QuantizedWeight:
    """A matrix (P, Q), as a stack of one, or a stack; of a scheme that `is_packable`."""
    scheme = kernel_scheme(rounded.grid)
    codes, scale, zero = rounded.codes, rounded.scales.scale, rounded.scales.zero
    if codes.dim() == 2:
        codes, scale, zero = codes[None], scale[None], None if zero is None else zero[None]
    if isinstance(rounded.grid, Mxfp4Grid):
        scale = scale / 2
    num_experts, num_rows, num_columns = codes.shape
    return QuantizedWeight(
        scheme=scheme,
        shape=(num_experts, num_rows, num_columns),
        packed=torch.stack([pack_int32(_integers(each, rounded.grid), NUM_BITS[scheme]) for each in codes]),
        scale=_narrowest(scale),
        group_size=rounded.grid.group_size,
        zero_point=None if zero is None else pack_int32(zero, NUM_BITS[scheme], dim=1),
    )


def _integers(codes_PQ: Tensor, grid: Grid) -> Tensor:
    if isinstance(grid, IntGrid):
        return codes_PQ
    return (grid.decode(codes_PQ, torch.ones(()), None) * 2).to(torch.int8)


def _narrowest(scale: Tensor) -> Tensor:
    """In the smallest dtype that holds all values: the one that they are stored in, or a smaller one."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(narrow := scale.to(dtype), scale):
            return narrow
    return scale
