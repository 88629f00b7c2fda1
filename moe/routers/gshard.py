"""GShard's top-2 gate (Lepikhin et al. 2020, arXiv 2006.16668): the second expert is dropped at random where it matters little.

    g1, g2 = the two largest of softmax(x W), divided by their sum;  keep the second with probability min(1, g2 / threshold)

The weights are not normalised again after a drop, so a token that loses its second expert gets g1 E1(x). Compute falls
below two experts per token as the gate grows confident.

Evaluation keeps every second expert. Mesh-TensorFlow's default draws in evaluation too, which would make a result depend
on the random state; keeping all is the deterministic choice that leaves the weights summing to one.

The balance loss is GShard's own: E * sum_e f_e P_e with f_e the share of the tokens whose *first* choice is e, so it is 1
at balance and E at collapse. (The layer's Switch loss would count second choices too: with the first two choices of all
tokens equal it could not exceed E / 2.) It is taken over the tokens of one forward pass, as the paper's over its groups.

Under a capacity limit every first choice comes before every second one, as in the paper, also where the list has no
fixed K: a first weight is at least 1/2 and a second at most 1/2, so "weight" priority has the same effect.

Differences between the released codes: Mesh-TensorFlow's threshold is 0.2, which is the default here; comments in lingvo
report runs with 0.5. Both add 1e-9 to g1 + g2; a softmax over the two logits needs no such term.

Legend: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices, routing_of_matrix
from moe.routers.base import Router, RouterConfig
from moe.routers.losses import count_assignments, switch_loss
from moe.types import NO_INFO, AuxLoss, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class GShardConfig(RouterConfig):
    """Options of `GShardRouter`; the defaults are Mesh-TensorFlow's.

    Attributes:
        second_policy: "random" drops second experts in training, "all" keeps them.
        threshold: a second expert whose normalised weight is at least this is always kept under "random".
        balance_coef: factor on GShard's balance loss; 0 turns it off. ``balance.aux_coef`` has no effect.
    """

    second_policy: Literal["random", "all"] = "random"
    threshold: float = 0.2
    balance_coef: float = 1e-2

    def __post_init__(self) -> None:
        if self.second_policy not in ("random", "all"):
            raise ValueError(f"router.second_policy={self.second_policy!r} is unknown; use 'random' or 'all'")
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"router.threshold={self.threshold} must lie in (0, 1]; set router.second_policy=all to keep every second expert"
            )
        if self.balance_coef < 0:
            raise ValueError(f"router.balance_coef={self.balance_coef} must not be negative")


class GShardRouter(Router):
    """Top-2 with renormalised softmax weights and, in training, random second experts."""

    Config = GShardConfig
    config: GShardConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: GShardConfig) -> None:
        super().__init__(dim, num_experts, config)
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: router gshard chooses two experts; use at least 2")
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``."""
        nn.init.normal_(self.weight, std=std)

    @property
    def mean_experts_per_token(self) -> float:
        """Two, which is exact in evaluation; how many are dropped in training depends on the data."""
        return 2

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to its best expert and, unless dropped, to its second."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(-1)
            ids_TK = logits_TE.detach().topk(2, dim=-1).indices
            weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
            aux_losses = {}
            if self.training:
                aux_losses["gshard"] = AuxLoss(
                    value=first_choice_loss(probs_TE, ids_TK[:, 0], info.keep_T), coef=self.config.balance_coef
                )
        if not self.training or self.config.second_policy == "all":
            return routing_of_choices(
                ids_TK, weights_TK, self.num_experts, logits_TE=logits_TE, probs_TE=probs_TE, aux_losses=aux_losses
            )
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        kept_TK[:, 1] = keep_second(weights_TK[:, 1], self.config.threshold)
        return routing_of_matrix(
            torch.zeros_like(probs_TE).scatter(1, ids_TK, weights_TK),
            torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, ids_TK, kept_TK),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            aux_losses=aux_losses,
        )


@torch.no_grad()
def keep_second(weights_T: Tensor, threshold: float) -> Tensor:
    """(T,) bool, True with probability min(1, weight / threshold)."""
    return torch.rand_like(weights_T) * threshold < weights_T


def first_choice_loss(probs_TE: Tensor, first_ids_T: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """GShard's balance loss, the Switch loss of the first choices (Mesh-TensorFlow scales it so too)."""
    num_tokens, num_experts = probs_TE.shape
    tokens_T = torch.arange(num_tokens, device=probs_TE.device)
    return switch_loss(probs_TE, count_assignments(first_ids_T, num_experts, tokens_T, keep_T), keep_T)
