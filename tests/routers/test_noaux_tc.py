"""DeepSeek-V3's gate: choice by biased scores within groups, weights by unbiased ones."""

import pytest
import torch
from helpers import oracles
from helpers.routing import make_router

T, E = 100, 16
OPTIONS = {"name": "noaux_tc", "num_groups": 4, "top_k_groups": 2, "top_k": 4, "route_scale": 2.5}


@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 5.0])
def test_choice_and_weights_against_the_loop(bias_scale: float) -> None:
    router = make_router(E, E, logits=True, **OPTIONS)
    router.bias_E.copy_(bias_scale * torch.randn(E))
    x_TD = torch.randn(T, E)
    routing = router(x_TD)
    scores_TE = x_TD.sigmoid()
    expected = [oracles.group_limited_choice(row, 4, 2, 4, num_best=2) for row in (scores_TE + router.bias_E).tolist()]
    assert routing.expert_ids_N.view(T, 4).tolist() == expected
    chosen_TK = scores_TE.gather(1, torch.tensor(expected))
    torch.testing.assert_close(routing.weights_N.view(T, 4), 2.5 * chosen_TK / chosen_TK.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.weights_N.view(T, 4).sum(-1), torch.full((T,), 2.5))


def test_groups_go_by_two_best_experts_not_by_one() -> None:
    router = make_router(8, 8, logits=True, name="noaux_tc", num_groups=2, top_k_groups=1, top_k=2)
    x_TD = torch.tensor([[5.0, -5, -5, -5, 1, 1, 1, 1]])  # one star against a strong pair
    assert set(router(x_TD).expert_ids_N.tolist()) <= {4, 5, 6, 7}


def test_masked_groups_lose_to_negative_scores() -> None:
    """A fill of 0 instead of -inf would let experts of dropped groups in where s + b is negative."""
    router = make_router(E, E, logits=True, **OPTIONS)
    router.bias_E.fill_(-5.0)
    routing = router(torch.randn(T, E))
    groups_TK = routing.expert_ids_N.view(T, 4) // 4
    assert all(len(set(row)) <= 2 for row in groups_TK.tolist())
    router.bias_E.zero_()
    assert torch.equal(routing.expert_ids_N, router(routing.logits_TE).expert_ids_N), "the same bias changes nothing"


def test_groups_of_one_expert() -> None:
    router = make_router(4, 4, logits=True, name="noaux_tc", num_groups=4, top_k_groups=3, top_k=2)
    x_TD = torch.randn(T, 4)
    assert torch.equal(router(x_TD).expert_ids_N.view(T, 2), x_TD.topk(2).indices)


def test_bias_acts_in_evaluation_too_and_is_saved() -> None:
    router = make_router(E, E, logits=True, name="noaux_tc").eval()
    router.bias_E[3] = 10
    assert (router(torch.randn(T, E)).expert_ids_N.view(T, 2)[:, 0] == 3).all()
    assert "bias_E" in router.state_dict()
    assert router.bias_E.dtype == torch.float32
    assert "bias_E" not in dict(router.named_parameters())


def test_gradient_reaches_only_what_was_chosen() -> None:
    router = make_router(E, E, logits=True, **OPTIONS)
    x_TD = torch.randn(T, E, requires_grad=True)
    routing = router(x_TD)
    (routing.weights_N * torch.randn(T * 4)).sum().backward()
    chosen_TE = torch.zeros(T, E).scatter(1, routing.expert_ids_N.view(T, 4), 1.0).bool()
    assert (x_TD.grad[~chosen_TE] == 0).all()
    assert (x_TD.grad[chosen_TE] != 0).all()
