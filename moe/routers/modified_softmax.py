"""Modified softmax gate (Nguyen et al., arXiv 2310.14188): the gate sees a bounded transform of the token.

softmax(M(x) b1 + b0) in place of softmax(x b1 + b0), with M(x) elementwise sigmoid or tanh, or x divided by its norm; the
experts still see x. It removes an interaction between the gate and expert functions that makes estimates converge slowly
where some expert parameters vanish. The paper analyses a gate over all experts; here the rest is the usual top-k.

Legend: T tokens, D model, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.base import WidthRole
from moe.routers.topk import TopKConfig, TopKRouter


def normalize(x_TD: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6): rows of norm 1, and 0 with a bounded gradient where x is 0."""
    return x_TD * (x_TD.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "normalize": normalize,
}


@dataclass(frozen=True, kw_only=True)
class ModifiedSoftmaxConfig(TopKConfig):
    """`TopKConfig` with the transform.

    Attributes:
        transform: M, "sigmoid", "tanh" or "normalize". The default keeps the sign of what a decoder's norm puts out.
    """

    transform: Literal["sigmoid", "tanh", "normalize"] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform not in TRANSFORMS:
            raise ValueError(f"router.transform={self.transform!r} is unknown; use one of {', '.join(TRANSFORMS)}")


class ModifiedSoftmaxRouter(TopKRouter):
    """Top-k gate with bias on a bounded transform of its input."""

    Config = ModifiedSoftmaxConfig
    config: ModifiedSoftmaxConfig

    def __init__(self, dim: int, num_experts: int, config: ModifiedSoftmaxConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def reset_parameters(self, std: float) -> None:
        """As `TopKRouter`, and no bias."""
        super().reset_parameters(std)
        if hasattr(self, "bias"):  # the base class initialises before it exists
            nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) fp32 M(x) b1 + b0."""
        return F.linear(TRANSFORMS[self.config.transform](x_TD), self.weight.float(), self.bias.float())

    def width_roles(self) -> dict[str, WidthRole]:
        """Normalised tokens have length 1 at any width."""
        role = WidthRole(role="unit_input" if self.config.transform == "normalize" else "output")
        return super().width_roles() | {"weight": role}
