"""Scales and codes of rounding to nearest: one rule for expert weights here and for every matrix that `moe.quant` rounds.

Legend: g values that share a scale.
"""

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max


def positive_scale(scale: Tensor, stored: torch.dtype, largest: float) -> Tensor:
    """A scale as it is stored, such that ``largest`` times it is finite in fp32.

    Where all values are zero, or too small for the dtype, any scale will do; this is the one of compressed-tensors 0.20.
    """
    limits = torch.finfo(stored)
    scale = scale.clamp_max(min(limits.max, _LARGEST / largest)).to(stored)
    return torch.where(scale > 0, scale, limits.eps)


def integer_scales(groups: Tensor, num_bits: int, symmetric: bool, stored: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ``calculate_qparams`` in compressed-tensors 0.20 (quantization/utils/helpers.py).

    Args:
        groups: (..., g) fp32, finite.
        num_bits: of the codes, which are signed.
        symmetric: zero is code 0.
        stored: dtype of the scales.

    Returns:
        (...) in ``stored``, and (...) fp32 whole numbers, or ``None``.
    """
    low, steps = -(1 << (num_bits - 1)), (1 << num_bits) - 1
    least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    if symmetric:
        return positive_scale(torch.maximum(-least, most) / (steps / 2), stored, steps), None
    scale = positive_scale((most - least).clamp_max(_LARGEST) / steps, stored, steps + 1)
    return scale, (low - least / scale.float()).round().clamp(low, low + steps)


def integer_codes(values: Tensor, scale: Tensor, zero: Tensor | None, num_bits: int) -> Tensor:
    """Nearest int8 codes of fp32 values; the three broadcast."""
    scaled = values / scale if zero is None else values / scale + zero
    low = -(1 << (num_bits - 1))
    return scaled.round().clamp(low, -low - 1).to(torch.int8)
