"""Round robin: token t goes to experts t * K, t * K + 1, ... modulo E, each with weight 1/K; a tool for debugging.

It learns nothing and looks at nothing, so the load is as even as it can be and a layer's output is known beforehand: what is
wrong with it is not the router's fault. The position counts over the whole batch, so a token's experts depend on where in the
batch it stands: generation with a cache, which sees one position at a time, is not the same as without.

Legend: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routers.assemble import routing_of_choices
from moe.routers.base import Router, RouterConfig, check_top_k
from moe.types import NO_INFO, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class RoundRobinConfig(RouterConfig):
    """Options of `RoundRobinRouter`.

    Attributes:
        top_k: K, experts per token.
        offset: expert of the first token.
    """

    top_k: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.offset < 0:
            raise ValueError(f"router.offset={self.offset} must not be negative")


class RoundRobinRouter(Router):
    """Deals tokens out to experts in turn; no parameters, no losses."""

    Config = RoundRobinConfig
    config: RoundRobinConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: RoundRobinConfig) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)

    def reset_parameters(self, std: float) -> None:
        """Nothing to initialise."""

    @property
    def mean_experts_per_token(self) -> float:
        """K."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to K experts by its place in the batch."""
        num_tokens, top_k = x_TD.shape[0], self.config.top_k
        turns_N = torch.arange(num_tokens * top_k, device=x_TD.device) + self.config.offset
        weights_TK = torch.full((num_tokens, top_k), 1 / top_k, device=x_TD.device)
        return routing_of_choices((turns_N % self.num_experts).view(num_tokens, top_k), weights_TK, self.num_experts)
