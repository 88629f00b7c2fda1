"""Dense-to-sparse gate (EvoMoE, arXiv 2112.14397): many experts per token at first, one at the end.

y = softmax((s + g) / tau) with Gumbel noise g in training, none in evaluation, and a temperature tau that falls. At first a
token uses all experts with y above a threshold; after ``hard_after`` steps only the one with the largest y. The weights
are y itself, not renormalised.

The statistics of this gate suffer from an interaction of tau with the gate's parameters; a nonlinear function of the linear
scores removes it (the activation dense-to-sparse gate of Nguyen et al., arXiv 2401.13875):
softmax(sigma(x b1) / tau + b0). With noise that is y = softmax((z + g) / tau) for the logits z = sigma(x b1) + tau * b0, so
that both gates are one formula.

Where EvoMoE's released code and this differ: there the weights are softmax(s) at temperature 1 unless a flag asks for y, and
evaluation takes the best expert only even while training still uses many. Its balance loss, E^2 mean(f P), is the Switch
loss with the share of tokens that use an expert as f; here the layer's own Switch loss applies.

Legend: T tokens, D model, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix
from moe.routers.gumbel import gumbel_noise, gumbel_softmax
from moe.routers.schedule import ScheduledRouter, TemperatureConfig
from moe.types import NO_INFO, Routing, TokenInfo

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


@dataclass(frozen=True, kw_only=True)
class DenseToSparseConfig(TemperatureConfig):
    """Options of `DenseToSparseRouter`.

    The temperatures are the defaults of EvoMoE's code. Its schedule has no default that works; ``temperature_steps`` and
    ``hard_after`` should be set to a part of the run.

    Attributes:
        threshold: a token uses the experts with y above it, and always the best one.
        hard_after: optimizer steps after which only the best expert is used; ``None`` is never.
        activation: sigma of the activation gate, "sigmoid", "tanh" or "gelu", which also adds the bias b0; "none" is EvoMoE's.
    """

    temperature_start: float = 1.0
    temperature_end: float = 0.5
    temperature_steps: int = 10_000
    threshold: float = 1e-3
    hard_after: int | None = 10_000
    activation: Literal["none", "sigmoid", "tanh", "gelu"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"router.threshold={self.threshold} must lie in [0, 1)")
        if self.hard_after is not None and self.hard_after < 0:
            raise ValueError(f"router.hard_after={self.hard_after} must not be negative; null never switches")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"router.activation={self.activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")


class DenseToSparseRouter(ScheduledRouter):
    """Gumbel-softmax over a threshold, then its best expert."""

    Config = DenseToSparseConfig
    config: DenseToSparseConfig

    def __init__(self, dim: int, num_experts: int, config: DenseToSparseConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.activation != "none" else None
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``, no bias, step 0."""
        super().reset_parameters(std)
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def mean_experts_per_token(self) -> float:
        """1, what the gate comes to; E where it never switches, an upper bound. Before the switch up to E experts run."""
        return self.num_experts if self.config.hard_after is None else 1

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route to the experts above the threshold, or to the best one."""
        steps = self.get_buffer("steps")
        with torch.autocast(x_TD.device.type, enabled=False):
            temperature = self.config.temperature(steps)
            logits_TE = self.logits(x_TD.float(), temperature)
            noise_TE = gumbel_noise(logits_TE) if self.training else torch.zeros_like(logits_TE)
            y_TE = gumbel_softmax(logits_TE, noise_TE, temperature)
            listed_TE = torch.zeros_like(y_TE, dtype=torch.bool).scatter(1, y_TE.argmax(-1, keepdim=True), True)
            above_TE = y_TE > self.config.threshold
            if self.config.hard_after is not None:
                above_TE = above_TE & (steps < self.config.hard_after)
            return routing_of_matrix(y_TE, listed_TE | above_TE, logits_TE=logits_TE, probs_TE=logits_TE.softmax(-1))

    def logits(self, x_TD: Tensor, temperature: Tensor) -> Tensor:
        """(T, E) fp32, z of the module's formula, from fp32 input."""
        scores_TE = F.linear(x_TD, self.weight.float())
        activation = ACTIVATIONS[self.config.activation]
        if activation is None or self.bias is None:
            return scores_TE
        return activation(scores_TE) + temperature * self.bias.float()
