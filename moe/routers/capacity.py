"""Capacity limits: drop the assignments an expert has no room for.

Legend: T tokens, E experts, K top-k, N assignments, C capacity.
"""

import dataclasses
import math
from typing import Literal

import torch

from moe.types import Routing


def apply_capacity(routing: Routing, capacity_factor: float, priority: Literal["choice", "weight"]) -> Routing:
    """Keep at most C = ceil(N / E * capacity_factor) assignments of each expert (arXiv 2101.03961 eq. 3).

    Weights of what is kept do not change: a token that lost an expert gets less, down to zero (its residual stays).

    Args:
        routing: before drops.
        capacity_factor: 1.0 leaves room for exactly a balanced load.
        priority: who stays. "choice": all first choices before any second choice, then token order (GShard, Switch);
            without a fixed number of choices per token it is the same as "weight". "weight": largest weight first
            (batch-prioritised routing, arXiv 2106.05974 section 3).
    """
    num_assignments, device = routing.expert_ids_N.numel(), routing.expert_ids_N.device
    # The small term keeps 100 * 1.1 = 110.00000000000001 from becoming 111.
    capacity = max(1, math.ceil(num_assignments * capacity_factor / routing.num_experts - 1e-9))
    if priority == "choice" and routing.top_k is not None:
        by_rank_N = torch.arange(num_assignments, device=device).view(-1, routing.top_k).T.reshape(-1)
    else:
        by_rank_N = routing.weights_N.detach().argsort(descending=True, stable=True)
    by_expert_N = by_rank_N[routing.expert_ids_N[by_rank_N].argsort(stable=True)]
    starts_E = routing.counts_E.cumsum(0) - routing.counts_E
    place_N = torch.arange(num_assignments, device=device) - starts_E[routing.expert_ids_N[by_expert_N]]
    kept_N = by_expert_N[place_N < capacity].sort().values
    num_dropped = num_assignments - kept_N.numel()
    if not num_dropped:
        return routing
    return dataclasses.replace(
        routing,
        token_ids_N=routing.token_ids_N[kept_N],
        expert_ids_N=routing.expert_ids_N[kept_N],
        weights_N=routing.weights_N[kept_N],
        top_k=None,
        num_dropped=num_dropped,
    )
