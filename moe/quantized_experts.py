"""A bank of quantised experts, which takes the place of an `ExpertBank` for inference.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), e local experts.
"""

from torch import Tensor

from moe.experts import ExpertBank
from moe.kernels import ops
from moe.kernels.quantized import QuantizedWeight, quantize_weight
from moe.quantized_module import QuantizedModule, in_autocast_dtype
from moe.types import Routing


class QuantizedExpertBank(QuantizedModule):
    """Routed experts in 4 or 8 bits: ``layer.experts = QuantizedExpertBank.from_bank(layer.experts, "w4a16", 128)``.

    Its weights are "gate_up_proj" and "down_proj"; see `QuantizedModule` for its state.

    Args:
        gate_up_proj: (e, H, D); for SwiGLU the gate's rows first, then the up-projection's.
        down_proj: (e, D, F), of the same scheme.
        activation: "swiglu" or "gelu".
    """

    def __init__(self, gate_up_proj: QuantizedWeight, down_proj: QuantizedWeight, activation: str) -> None:
        super().__init__({"gate_up_proj": gate_up_proj, "down_proj": down_proj})
        self.activation = activation

    @classmethod
    def from_bank(
        cls, bank: ExpertBank, scheme: str, group_size: int | None = None, symmetric: bool = True
    ) -> "QuantizedExpertBank":
        """A bank's weights, rounded to nearest; arguments as in `moe.kernels.quantized.quantize_weight`."""
        up = quantize_weight(bank.gate_up_proj.detach(), scheme, group_size, symmetric)
        down = quantize_weight(bank.down_proj.detach(), scheme, group_size, symmetric)
        return cls(up, down, bank.activation)

    @property
    def num_experts(self) -> int:
        """e, experts on this rank."""
        return self._forms["down_proj"].shape[0]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, (T, D); expert ids are those of this rank."""
        x_TD = in_autocast_dtype(x_TD)
        weights = self.multipliers(x_TD)
        return ops.expert_ffn_quantized(x_TD, routing, weights["gate_up_proj"], weights["down_proj"], self.activation)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        num_experts, dim, hidden = self._forms["down_proj"].shape
        return (
            f"num_experts={num_experts}, dim={dim}, hidden={hidden}, activation={self.activation}, "
            f"scheme={self.scheme}, group_size={self._forms['gate_up_proj'].group_size}"
        )
