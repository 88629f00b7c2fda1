"""Norms whose gain a scale of channels can be folded into, found out by trying.

Architectures write the gain of a normalised vector n in different ways: n w (Llama), n (1 + w) (Gemma), n w + b (LayerNorm). What a
norm does is seen from its outputs with other weights, so no class names are needed.

Legend: D channels, T rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4
_MOST_RMS, _LEAST_RMS = 1.02, 0.5  # of normalised rows; below 1 where epsilon counts
_MOST_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A norm whose output is n (offset + weight) + bias.

    Attributes:
        norm: the module.
        offset: 0, or 1 for a weight that is stored zero-centred.
    """

    norm: nn.Module
    offset: float

    @property
    def bias(self) -> Tensor | None:
        """(D,) or ``None``."""
        return getattr(self.norm, "bias", None)

    def value(self) -> Tensor:
        """(D,) fp32 gain of each channel."""
        return self.norm.get_parameter("weight").data.float() + self.offset

    def divide(self, scale_D: Tensor) -> None:
        """Divide the norm's output by ``scale_D``."""
        weight_D = self.norm.get_parameter("weight").data
        weight_D.copy_(self.value() / scale_D - self.offset)
        if self.bias is not None:
            self.bias.data.div_(scale_D)

    def storable(self, scale_D: Tensor, stored: torch.dtype) -> Tensor:
        """The nearest scale for which the weight after `divide` is exact in the dtype of the checkpoint.

        The norm is not quantised, so without this a bf16 checkpoint would add an error of 2^-9 to every channel.
        """
        value_D = self.value()
        exact_D = (value_D / scale_D - self.offset).to(stored).float() + self.offset
        return torch.where(value_D * exact_D > 0, value_D / exact_D, scale_D)

    def made(self, x_TD: Tensor) -> bool:
        """Whether rows may be outputs of this norm: without gain and bias their root mean square is 1, or less for tiny inputs."""
        value_D = self.value()
        rows_TD = x_TD[:_MOST_ROWS] if self.bias is None else x_TD[:_MOST_ROWS] - self.bias.data
        rms_T = torch.where(value_D == 0, 0, rows_TD / value_D).square().mean(-1).sqrt()
        return bool((rms_T < _MOST_RMS).all()) and bool(rms_T.median() > _LEAST_RMS)


@torch.no_grad()
def find_gain(norm: nn.Module) -> Gain | None:
    """How a norm applies its weight; ``None`` where it is not one of the known ways."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    probe_TD = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    bias = getattr(norm, "bias", None)
    bias_D = torch.zeros_like(weight) if bias is None else bias.data
    kept_D, before_TD = weight.data, norm(probe_TD) - bias_D
    try:
        weight.data = torch.zeros_like(kept_D)
        base_TD = norm(probe_TD) - bias_D
        weight.data = torch.ones_like(kept_D)
        unit_TD = norm(probe_TD) - bias_D - base_TD
    finally:
        weight.data = kept_D
    for offset in (0.0, 1.0):
        expected_TD = unit_TD * (kept_D + offset)
        if _same(base_TD, offset * unit_TD) and _same(before_TD, expected_TD):
            return Gain(norm=norm, offset=offset)
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max().clamp_min(1))
