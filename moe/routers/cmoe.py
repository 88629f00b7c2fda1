"""CMoE's gate: the activation of one representative neuron per expert is the expert's score (Pei et al., arXiv 2502.04416).

s = softmax(|(x Wu) * silu(x Wg)|); the K largest of s + b are chosen, b being the selection bias; a chosen expert's weight is
1 + s u, with u learned from 0. The released code takes the absolute value, the paper does not say so; it is followed here.
`moe carve --method cmoe` makes these weights of a dense FFN's own rows.

Legend: T tokens, D model, E experts, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.base import WidthRole
from moe.routers.topk import TopKConfig, TopKRouter


@dataclass(frozen=True, kw_only=True)
class CMoEConfig(TopKConfig):
    """`TopKConfig` with CMoE's choices; set ``balance.bias_update_rate`` so that the bias moves (1e-3 there)."""

    selection_bias: bool = True
    renormalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = {"score": "softmax", "softmax_order": "before", "renormalize": False, "route_scale": 1.0}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"router.{name}={getattr(self, name)!r} does not go with router cmoe; leave it out")


class CMoERouter(TopKRouter):
    """Top-k of |(x Wu) * silu(x Wg)|, with weights near 1; ``weight`` is Wg."""

    Config = CMoEConfig
    config: CMoEConfig

    def __init__(self, dim: int, num_experts: int, config: CMoEConfig) -> None:
        super().__init__(dim, num_experts, config)
        trained = not config.frozen
        self.up_weight = nn.Parameter(self.weight.detach().clone(), requires_grad=trained)
        self.scale = nn.Parameter(torch.zeros(num_experts), requires_grad=trained)

    def reset_parameters(self, std: float) -> None:
        """As `TopKRouter`, the second matrix too; u is zero."""
        super().reset_parameters(std)
        if hasattr(self, "scale"):  # the base class initialises before it exists
            nn.init.normal_(self.up_weight, std=std)
            nn.init.zeros_(self.scale)

    def width_roles(self) -> dict[str, WidthRole]:
        """Its rows are neurons: of two factors that both shrank with width, neither would learn."""
        return super().width_roles() | dict.fromkeys(("weight", "up_weight"), WidthRole(role="hidden"))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) fp32 |(x Wu) * silu(x Wg)|."""
        gate_TE = F.silu(F.linear(x_TD, self.weight.float()))
        return (F.linear(x_TD, self.up_weight.float()) * gate_TE).abs()

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """(T, K) fp32 1 + s u."""
        return 1 + scores_TE.gather(1, expert_ids_TK) * self.scale.float()[expert_ids_TK]
