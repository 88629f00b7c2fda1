"""The two ways to make a `Routing`: from K chosen experts per token, or from a T x E matrix with zeros; straight-through weights.

Legend: T tokens, E experts, K top-k, N assignments.
"""

from typing import Any

import torch
from torch import Tensor

from moe.routers.losses import count_assignments
from moe.types import Routing


def routing_of_choices(
    expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, counts_E: Tensor | None = None, **rest: Any
) -> Routing:
    """Exactly K different experts per token, best first.

    Args:
        expert_ids_TK: (T, K) int64.
        weights_TK: (T, K) fp32 with gradient.
        num_experts: E.
        counts_E: (E,) int64 where they are known; counted otherwise.
        rest: further fields of `Routing`.
    """
    num_tokens, top_k = expert_ids_TK.shape
    expert_ids_N = expert_ids_TK.reshape(-1)
    return Routing(
        num_tokens=num_tokens,
        num_experts=num_experts,
        token_ids_N=torch.arange(num_tokens, device=expert_ids_N.device).repeat_interleave(top_k),
        expert_ids_N=expert_ids_N,
        weights_N=weights_TK.reshape(-1),
        counts_E=count_assignments(expert_ids_N, num_experts) if counts_E is None else counts_E,
        top_k=top_k,
        **rest,
    )


def routing_of_matrix(weights_TE: Tensor, listed_TE: Tensor | None = None, **rest: Any) -> Routing:
    """The entries of a matrix that are not exactly zero; their number varies from token to token.

    Args:
        weights_TE: (T, E) fp32 with gradient.
        listed_TE: (T, E) bool, which entries to list instead; an entry of weight zero gets a gradient only if listed.
        rest: further fields of `Routing`.
    """
    num_tokens, num_experts = weights_TE.shape
    listed_TE = weights_TE != 0 if listed_TE is None else listed_TE
    token_ids_N, expert_ids_N = listed_TE.nonzero(as_tuple=True)
    return Routing(
        num_tokens=num_tokens,
        num_experts=num_experts,
        token_ids_N=token_ids_N,
        expert_ids_N=expert_ids_N,
        weights_N=weights_TE[token_ids_N, expert_ids_N],
        counts_E=listed_TE.sum(0),
        **rest,
    )


def straight_through(forward: Tensor, backward: Tensor) -> Tensor:
    """The value of ``forward``, exactly, with the gradient of ``backward`` (arXiv 1308.3432)."""
    return forward + (backward - backward.detach())
