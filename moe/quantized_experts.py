"""A bank of quantised experts, which takes the place of an `ExpertBank` for inference.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), e local experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.experts import ExpertBank
from moe.kernels import ops
from moe.kernels.quantized import QuantizedWeight, quantize_weight
from moe.types import Routing


class QuantizedExpertBank(nn.Module):
    """Routed experts in 4 or 8 bits: ``layer.experts = QuantizedExpertBank.from_bank(layer.experts, "w4a16", 128)``.

    Its state are the tensors of both weights, ``gate_up_proj_packed``, ``gate_up_proj_scale`` and so on. They move between devices,
    but conversions of dtype (``module.half()``) pass them by. Products are in the dtype of the input.

    Args:
        gate_up_proj: (e, H, D); for SwiGLU the gate's rows first, then the up-projection's.
        down_proj: (e, D, F), of the same scheme.
        activation: "swiglu" or "gelu".
    """

    def __init__(self, gate_up_proj: QuantizedWeight, down_proj: QuantizedWeight, activation: str) -> None:
        super().__init__()
        self.activation, self.scheme = activation, gate_up_proj.scheme
        self._shapes = {"gate_up_proj": gate_up_proj.shape, "down_proj": down_proj.shape}
        self._group_sizes = {"gate_up_proj": gate_up_proj.group_size, "down_proj": down_proj.group_size}
        for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
            self.register_buffer(f"{name}_packed", weight.packed)
            self.register_buffer(f"{name}_scale", weight.scale)
            self.register_buffer(f"{name}_zero_point", weight.zero_point)

    @classmethod
    def from_bank(
        cls, bank: ExpertBank, scheme: str, group_size: int | None = None, symmetric: bool = True
    ) -> "QuantizedExpertBank":
        """A bank's weights, rounded to nearest; arguments as in `moe.kernels.quantized.quantize_weight`."""
        up = quantize_weight(bank.gate_up_proj.detach(), scheme, group_size, symmetric)
        down = quantize_weight(bank.down_proj.detach(), scheme, group_size, symmetric)
        return cls(up, down, bank.activation)

    def weight(self, name: str) -> QuantizedWeight:
        """The weight "gate_up_proj" or "down_proj"."""
        return QuantizedWeight(
            scheme=self.scheme,
            shape=self._shapes[name],
            packed=getattr(self, f"{name}_packed"),
            scale=getattr(self, f"{name}_scale"),
            group_size=self._group_sizes[name],
            zero_point=getattr(self, f"{name}_zero_point"),
        )

    @property
    def num_experts(self) -> int:
        """e, experts on this rank."""
        return self._shapes["down_proj"][0]

    @property
    def num_bytes(self) -> int:
        """Memory of all weights, in bytes."""
        return self.weight("gate_up_proj").num_bytes + self.weight("down_proj").num_bytes

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, (T, D); expert ids are those of this rank."""
        device_type = x_TD.device.type
        if torch.is_autocast_enabled(device_type):
            x_TD = x_TD.to(torch.get_autocast_dtype(device_type))
        return ops.expert_ffn_quantized(
            x_TD, routing, self.weight("gate_up_proj"), self.weight("down_proj"), self.activation
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedExpertBank":
        # What `to`, `half`, `cuda` do to every tensor; seen as bytes, codes and scales move but are not converted.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        num_experts, dim, hidden = self._shapes["down_proj"]
        return (
            f"num_experts={num_experts}, dim={dim}, hidden={hidden}, activation={self.activation}, "
            f"scheme={self.scheme}, group_size={self._group_sizes['gate_up_proj']}"
        )
