"""What holds for every sparse routing, and short ways to make routers and routings."""

from typing import Any

import torch
from torch import Tensor

from moe.routers import Router, parse_router
from moe.types import Routing


def make_router(dim: int, num_experts: int, *, logits: bool = False, **options: Any) -> Router:
    """A router from config options; with ``logits`` its weight is the identity, so that its input is its logits."""
    router_class, config = parse_router(options)
    router = router_class(dim, num_experts, config)
    if logits:
        assert dim == num_experts
        with torch.no_grad():
            router.get_parameter("weight").copy_(torch.eye(dim))
    return router


def make_routing(expert_ids: list[int], num_experts: int, weights: list[float], top_k: int | None) -> Routing:
    """A routing from lists; tokens in blocks of ``top_k``, or of one each where it is ``None``."""
    expert_ids_N = torch.tensor(expert_ids, dtype=torch.int64)
    token_ids_N = torch.arange(len(expert_ids)) // (top_k or 1)
    return Routing(
        num_tokens=len(expert_ids) // (top_k or 1),
        num_experts=num_experts,
        token_ids_N=token_ids_N,
        expert_ids_N=expert_ids_N,
        weights_N=torch.tensor(weights),
        counts_E=torch.bincount(expert_ids_N, minlength=num_experts),
        top_k=top_k,
    )


def check_routing(routing: Routing, num_tokens: int, num_experts: int) -> None:
    """Shapes, dtypes, ranges and sums that `Routing` promises."""
    assert (routing.num_tokens, routing.num_experts) == (num_tokens, num_experts)
    num_assignments = routing.token_ids_N.numel()
    for ids_N, bound in ((routing.token_ids_N, num_tokens), (routing.expert_ids_N, num_experts)):
        assert ids_N.shape == (num_assignments,)
        assert ids_N.dtype == torch.int64
        assert bool(((ids_N >= 0) & (ids_N < bound)).all())
    assert routing.weights_N.shape == (num_assignments,)
    assert routing.weights_N.dtype == torch.float32
    assert routing.weights_N.isfinite().all()
    assert routing.counts_E.dtype == torch.int64
    assert torch.equal(routing.counts_E, torch.bincount(routing.expert_ids_N, minlength=num_experts))
    pairs = set(zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), strict=True))
    assert len(pairs) == num_assignments, "a token has an expert twice"
    if routing.top_k is not None:
        assert num_assignments == num_tokens * routing.top_k
        assert routing.token_ids_N.tolist() == [t for t in range(num_tokens) for _ in range(routing.top_k)]
    if routing.logits_TE is not None:
        _check_scores(routing.logits_TE, num_tokens, num_experts)
    if routing.probs_TE is not None:
        _check_scores(routing.probs_TE, num_tokens, num_experts)
        assert (routing.probs_TE >= 0).all()
        sums_T = routing.probs_TE.sum(-1)
        saturated_T = (routing.probs_TE == 0).all(-1)  # sigmoids of logits that are all below some -100
        torch.testing.assert_close(sums_T[~saturated_T], torch.ones(num_tokens)[~saturated_T], atol=1e-5, rtol=0)
    for loss in routing.aux_losses.values():
        assert loss.value.shape == ()
        assert loss.value.dtype == torch.float32
        assert loss.value.isfinite()


def _check_scores(scores_TE: Tensor, num_tokens: int, num_experts: int) -> None:
    assert scores_TE.shape == (num_tokens, num_experts)
    assert scores_TE.dtype == torch.float32
    assert scores_TE.isfinite().all()
