"""Expert choice (Zhou et al., arXiv 2202.09368): experts take tokens, so loads are equal by construction.

Scores are a softmax over the experts for each token. Every expert takes the C = M * capacity / E tokens of a group that score
highest for it, with that score as the weight. A token may have any number of experts, none included (the residual carries
it). There is nothing to balance.

Who is taken depends on the other tokens of the group. In a batch or a sequence these include later ones, so a causal model
learns to read its future in the routing; position groups do not have that (arXiv 2402.07871 trains with those, of 256 sequences).

Legend: T tokens, D model, E experts, G groups, M rows of a group, C tokens that an expert takes of a group.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix
from moe.routers.base import Router, RouterConfig
from moe.routers.groups import GroupKind, check_group, describe_leak, group_tokens, warn_of_extra_work
from moe.types import NO_INFO, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """Options of `ExpertChoiceRouter`.

    Attributes:
        capacity: experts per token on average; 2 in the paper's main runs.
        group: the tokens among which an expert chooses: "position", "sequence" or "batch" (see `moe.routers.groups`).
        group_size: sequences in a position group; needs at least E / capacity, below which an expert's one token per group
            is already too many.
    """

    capacity: float = 2.0
    group: GroupKind = "position"
    group_size: int = 256

    def __post_init__(self) -> None:
        check_group(self.group, self.group_size)
        if self.capacity <= 0:
            raise ValueError(f"router.capacity={self.capacity} must be positive")


class ExpertChoiceRouter(Router):
    """Linear gate without bias; each expert takes its best tokens of every group."""

    Config = ExpertChoiceConfig
    config: ExpertChoiceConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: ExpertChoiceConfig) -> None:
        super().__init__(dim, num_experts, config)
        if config.capacity > num_experts:
            raise ValueError(
                f"router.capacity={config.capacity} is more than num_experts={num_experts}; lower it or add experts"
            )
        if config.group == "position" and config.group_size * config.capacity < num_experts:
            raise ValueError(
                f"router.group_size={config.group_size} is below num_experts / router.capacity = "
                f"{num_experts / config.capacity:g}, so that experts have less than one token of a group to take; raise "
                "router.group_size or router.capacity"
            )
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``."""
        nn.init.normal_(self.weight, std=std)

    @property
    def mean_experts_per_token(self) -> float:
        """The capacity."""
        return self.config.capacity

    def causal_problem(self) -> str | None:
        """Groups with several tokens of a sequence see the future."""
        return None if self.config.group == "position" else describe_leak("expert_choice", self.config.group)

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route so that each expert has the same number of tokens of every group; padding is never taken."""
        groups = group_tokens(x_TD.shape[0], info, self.config.group, self.config.group_size, x_TD.device)
        if self.training and groups.num_rows:
            taken = num_taken(groups.num_rows, self.config.capacity, self.num_experts)
            done, asked = self.num_experts * taken / groups.num_rows, self.config.capacity
            fix = "use a larger micro-batch, or raise router.capacity"
            warn_of_extra_work("expert_choice", done, asked, groups.num_rows, fix)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(-1)
            taken_GME = choose_tokens(groups.gather(probs_TE.detach()), groups.real_GM, self.config.capacity)
            return routing_of_matrix(probs_TE, groups.scatter(taken_GME), logits_TE=logits_TE, probs_TE=probs_TE)


def num_taken(num_rows: int, capacity: float, num_experts: int) -> int:
    """C, tokens that each expert takes of ``num_rows``: num_rows * capacity / E to the nearest, at least 1.

    To the nearest as in released code, so that the work is what was asked on average over group sizes.
    """
    return min(max(1, math.floor(num_rows * capacity / num_experts + 0.5)), num_rows)


def choose_tokens(scores_GME: Tensor, real_GM: Tensor | None, capacity: float) -> Tensor:
    """(G, M, E) bool, the tokens that each expert takes.

    Args:
        scores_GME: (G, M, E), none negative.
        real_GM: (G, M) bool, the rows to choose from; C follows their number in each group, so padding changes nothing.
        capacity: experts per token on average.
    """
    _, num_rows, num_experts = scores_GME.shape
    most = num_taken(num_rows, capacity, num_experts)
    if real_GM is not None:
        scores_GME = scores_GME.masked_fill(~real_GM[..., None], -1.0)
    ids_GCE = scores_GME.topk(most, dim=1).indices
    taken_GCE = torch.ones_like(ids_GCE, dtype=torch.bool)
    if real_GM is not None:
        limit_G = (real_GM.sum(1).double() * capacity / num_experts + 0.5).floor().clamp(min=1)
        taken_GCE = torch.arange(most, device=ids_GCE.device)[:, None] < limit_G[:, None, None]
    taken_GME = torch.zeros_like(scores_GME, dtype=torch.bool).scatter(1, ids_GCE, taken_GCE.expand_as(ids_GCE))
    return taken_GME if real_GM is None else taken_GME & real_GM[..., None]
