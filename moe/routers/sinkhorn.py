"""Routing by a balanced assignment in training: Sinkhorn iterations, or the exact assignment of BASE layers.

"sinkhorn"  Megatron-LM's router: experts get prices under which the softmax over experts spends equally on all of them, and a
            token takes its best K after prices. Loads are nearly equal.
"optimal"   BASE (Lewis et al., arXiv 2103.16716): the assignment of one expert to each token with the largest sum of logits
            among those with equal loads.

Weights come from the logits alone: their sigmoid for K = 1, as in BASE, else their softmax, not renormalised. No gradient
passes through the assignment, and there is no balance loss. In evaluation a token takes its best K logits, whatever the others
do. In training its experts depend on the other tokens of the group, later ones of its sequence among them, so that a causal
model needs position groups, or has to accept the leak as those papers and codes do.

BASE mixes the tokens of all workers before the assignment; here each rank assigns its own micro-batch.

Legend: T tokens, D model, E experts, K top-k, G groups, M rows of a group.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices
from moe.routers.assignment import balanced_assignment, sinkhorn_prices
from moe.routers.base import Router, RouterConfig, WidthRole, check_top_k
from moe.routers.groups import GroupKind, TokenGroups, check_group, describe_leak, group_tokens
from moe.types import NO_INFO, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(RouterConfig):
    """Options of `SinkhornRouter`.

    Attributes:
        assignment: "sinkhorn" or "optimal", see above; the exact one runs on the CPU, one group after the other.
        top_k: K, experts per token; 1 for the exact assignment.
        group: the tokens that are assigned together: "batch", "sequence" or "position" (see `moe.routers.groups`).
        group_size: sequences in a position group; with fewer than E / K of them equal loads are out of reach.
        accept_leak: let causal models train on assignments that see later tokens.
        tolerance: Sinkhorn iterations end when no expert's share is further than this from equal, relatively.
        max_iterations: and at the latest after so many.
        init: "normal" of the model's range, or "orthogonal" of gain 0.1 (BASE).
    """

    assignment: Literal["sinkhorn", "optimal"] = "sinkhorn"
    top_k: int = 1
    group: GroupKind = "batch"
    group_size: int = 256
    accept_leak: bool = False
    tolerance: float = 1e-4
    max_iterations: int = 100
    init: Literal["normal", "orthogonal"] = "normal"

    def __post_init__(self) -> None:
        check_group(self.group, self.group_size)
        if self.assignment not in ("sinkhorn", "optimal"):
            raise ValueError(f"router.assignment={self.assignment!r} is unknown; use 'sinkhorn' or 'optimal'")
        if self.init not in ("normal", "orthogonal"):
            raise ValueError(f"router.init={self.init!r} is unknown; use 'normal' or 'orthogonal'")
        for name in ("top_k", "max_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"router.{name}={getattr(self, name)} must be at least 1")
        if self.tolerance <= 0:
            raise ValueError(f"router.tolerance={self.tolerance} must be positive")
        if self.assignment == "optimal" and self.top_k != 1:
            raise ValueError(
                f"router.assignment='optimal' gives each token one expert, not router.top_k={self.top_k}; set "
                "router.top_k=1, or router.assignment=sinkhorn"
            )


class SinkhornRouter(Router):
    """Linear gate without bias; balanced assignment in training, greedy top-k in evaluation."""

    Config = SinkhornConfig
    config: SinkhornConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: SinkhornConfig) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``, or orthogonal rows."""
        if self.config.init == "normal":
            nn.init.normal_(self.weight, std=std)
        elif not self.weight.is_meta:  # has no values there, and orthogonal_ needs some
            nn.init.orthogonal_(self.weight, gain=0.1)

    def width_roles(self) -> dict[str, WidthRole]:
        """Orthogonal rows have a length that does not depend on D."""
        return {"weight": WidthRole(role="output", init_exponent=0.5 if self.config.init == "orthogonal" else 0.0)}

    @property
    def mean_experts_per_token(self) -> float:
        """K."""
        return self.config.top_k

    def causal_problem(self) -> str | None:
        """In training the assignment of a group with several tokens of a sequence sees the future."""
        if self.config.group == "position" or self.config.accept_leak:
            return None
        problem = describe_leak("sinkhorn", self.config.group)
        return f"{problem}, or router.accept_leak=true (evaluation does not look at other tokens)"

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to K experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(-1)
            preferences_TE = logits_TE.detach()
            if self.training:
                config = self.config
                groups = group_tokens(x_TD.shape[0], info, config.group, config.group_size, x_TD.device)
                preferences_TE = self._balanced(preferences_TE, groups)
            expert_ids_TK = preferences_TE.topk(self.config.top_k, dim=-1).indices
            gates_TE = logits_TE.sigmoid() if self.config.top_k == 1 else probs_TE
            weights_TK = gates_TE.gather(1, expert_ids_TK)
        return routing_of_choices(expert_ids_TK, weights_TK, self.num_experts, logits_TE=logits_TE, probs_TE=probs_TE)

    def _balanced(self, logits_TE: Tensor, groups: TokenGroups) -> Tensor:
        """(T, E) preferences whose top-k is the assignment; padding takes up no expert's share."""
        logits_GME = groups.gather(logits_TE)
        if self.config.assignment == "sinkhorn":
            config = self.config
            prices_G1E = sinkhorn_prices(logits_GME, groups.real_GM, config.tolerance, config.max_iterations)
            return groups.scatter(logits_GME - prices_G1E)
        preferences_GME = logits_GME.clone()
        for group, preferences_ME in enumerate(preferences_GME):
            real_M = slice(None) if groups.real_GM is None else groups.real_GM[group]
            expert_ids_n = balanced_assignment(preferences_ME[real_M])
            preferences_ME[real_M] = F.one_hot(expert_ids_n, self.num_experts).to(logits_TE.dtype)
        return groups.scatter(preferences_GME)
