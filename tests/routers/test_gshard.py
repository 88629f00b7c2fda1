"""GShard's top-2 gate (arXiv 2006.16668): random second experts, weights, its balance loss, and capacity."""

import pytest
import torch
from helpers.close import assert_close
from helpers.routing import make_router
from torch import Tensor

from moe.routers.capacity import apply_capacity
from moe.routers.gshard import first_choice_loss, keep_second
from moe.types import Routing, TokenInfo

T, E = 400, 8


def pairs(routing: Routing) -> dict[tuple[int, int], Tensor]:
    """Weights by token and expert."""
    ids = zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), strict=True)
    return dict(zip(ids, routing.weights_N, strict=True))


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.03, 0.1, 0.19, 0.2, 0.35, 0.5])
def test_second_expert_is_kept_with_its_probability(threshold: float, weight: float) -> None:
    num_tokens, chance = 40_000, min(1.0, weight / threshold)
    torch.manual_seed(1)
    share = keep_second(torch.full((num_tokens,), weight), threshold).double().mean().item()
    assert abs(share - chance) <= 5 * (chance * (1 - chance) / num_tokens) ** 0.5


def test_router_drops_by_the_normalised_weight() -> None:
    """Logits 0 and -ln 9: the second weighs .1 after normalisation (less before), so it is kept half of the time."""
    router = make_router(E, E, logits=True, name="gshard")
    x_TD = torch.full((20_000, E), -3.0)
    x_TD[:, 3], x_TD[:, 5] = 0.0, -torch.tensor(9.0).log()
    torch.manual_seed(2)
    routing = router(x_TD)
    assert routing.counts_E[3] == 20_000
    assert abs(routing.counts_E[5].item() / 20_000 - 0.5) < 5 * 0.5 / 20_000**0.5
    assert routing.counts_E.sum() == routing.counts_E[3] + routing.counts_E[5]
    assert routing.top_k is None


def test_weights_are_normalised_before_the_drop_and_not_after() -> None:
    router = make_router(E, E, logits=True, name="gshard", threshold=1.0)  # drops more than half
    x_TD = 2 * torch.randn(T, E)
    found = pairs(router(x_TD))
    best_TK = x_TD.double().softmax(-1).topk(2)
    num_alone = 0
    for t in range(T):
        first, second = best_TK.indices[t].tolist()
        g1, g2 = (best_TK.values[t] / best_TK.values[t].sum()).tolist()
        assert found.pop((t, first)).item() == pytest.approx(g1, rel=1e-5)
        if (t, second) in found:
            assert found.pop((t, second)).item() == pytest.approx(g2, rel=1e-4)
        else:
            num_alone += 1
    assert not found
    assert T / 4 < num_alone < T


@pytest.mark.parametrize("policy", ["random", "all"])
def test_gradient_is_that_of_the_kept_weights(policy: str) -> None:
    """Also a token without its second expert sends a gradient to that expert's logit, through the normalisation."""
    router = make_router(E, E, logits=True, name="gshard", threshold=1.0, second_policy=policy)
    x_TD = torch.randn(T, E, requires_grad=True)
    routing = router(x_TD)
    upstream_N = torch.randn(routing.weights_N.shape)
    routing.weights_N.backward(upstream_N)

    x64_TD = x_TD.detach().double().requires_grad_()
    ids_TK = x64_TD.topk(2).indices
    chosen_TK = x64_TD.softmax(-1).gather(1, ids_TK)
    weights_TE = torch.zeros_like(x64_TD).scatter(1, ids_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True))
    weights_TE[routing.token_ids_N, routing.expert_ids_N].backward(upstream_N.double())
    assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)
    alone_T = torch.bincount(routing.token_ids_N, minlength=T) == 1
    assert alone_T.any() == (policy == "random")
    assert (x_TD.grad[alone_T].gather(1, ids_TK[alone_T, 1:]).abs() > 0).all()


@pytest.mark.parametrize("policy", ["random", "all"])
def test_evaluation_keeps_every_second_expert(policy: str) -> None:
    router = make_router(E, E, logits=True, name="gshard", threshold=1.0, second_policy=policy).eval()
    topk = make_router(E, E, logits=True, name="topk").eval()
    x_TD = torch.randn(T, E)
    routing, expected = router(x_TD), topk(x_TD)
    assert routing.top_k == 2
    assert torch.equal(routing.expert_ids_N, expected.expert_ids_N)
    torch.testing.assert_close(routing.weights_N, expected.weights_N)
    assert not routing.aux_losses


def test_policy_all_keeps_them_in_training_too() -> None:
    x_TD = 5 * torch.randn(T, E)
    assert make_router(E, E, logits=True, name="gshard", second_policy="all")(x_TD).counts_E.sum() == 2 * T
    assert make_router(E, E, logits=True, name="gshard")(x_TD).counts_E.sum() < 2 * T


def test_balance_loss_is_one_at_balance_and_e_at_collapse() -> None:
    balanced_TE = 50 * torch.eye(E).repeat(4, 1)
    router = make_router(E, E, logits=True, name="gshard")
    assert router(balanced_TE).aux_losses["gshard"].value.item() == pytest.approx(1.0)
    assert router(torch.zeros(T, E)).aux_losses["gshard"].value.item() == pytest.approx(1.0)  # P is uniform
    collapsed_TE = torch.zeros(T, E)
    collapsed_TE[:, 2] = 50
    loss = router(collapsed_TE).aux_losses["gshard"]
    assert loss.value.item() == pytest.approx(E)
    assert loss.coef == 1e-2
    assert not router.takes_balance_loss


def test_balance_loss_counts_first_choices_only() -> None:
    """First choices balanced, and expert 0 the second of all: not a reason for a loss above 1 * sum(P) = 1."""
    logits_TE = 4 * torch.eye(E)
    logits_TE[1:, 0] = 3
    probs_TE = logits_TE.double().softmax(-1).requires_grad_()
    loss = first_choice_loss(probs_TE, logits_TE.argmax(-1))
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    torch.testing.assert_close(probs_TE.grad, torch.full_like(probs_TE, 1 / E))  # E * f_e / T with f = 1 / E and T = E


def test_balance_loss_against_the_loop_without_padding() -> None:
    router = make_router(E, E, logits=True, name="gshard")
    x_TD, keep_T = torch.randn(T, E), torch.rand(T) < 0.6
    got = router(x_TD, TokenInfo(keep_T=keep_T)).aux_losses["gshard"].value.item()
    kept = [row.double() for row, keep in zip(x_TD, keep_T.tolist(), strict=True) if keep]
    expected = 0.0
    for e in range(E):
        share = sum(row.argmax().item() == e for row in kept) / len(kept)
        expected += E * share * sum(row.softmax(-1)[e].item() for row in kept) / len(kept)
    assert got == pytest.approx(expected, rel=1e-5)
    none = router(x_TD, TokenInfo(keep_T=torch.zeros(T, dtype=torch.bool))).aux_losses["gshard"].value
    assert none.item() == 0


@pytest.mark.parametrize("priority", ["choice", "weight"])
def test_first_choices_have_room_before_second_ones(priority: str) -> None:
    """Without a fixed K as well: an expert that dropped a first choice serves no second one."""
    routing = make_router(E, E, logits=True, name="gshard", threshold=0.5)(torch.randn(T, E) + torch.arange(E) / 4)
    assert routing.top_k is None
    kept = apply_capacity(routing, 1.0, priority)
    first = {pair for pair, weight in pairs(routing).items() if weight > 0.5}
    lost = pairs(routing).keys() - pairs(kept).keys()
    full = {expert for token, expert in lost if (token, expert) in first}
    assert full, "no first choice was dropped; the case is too easy"
    assert all(pair in first for pair in pairs(kept) if pair[1] in full)
    assert lost - first, "no second choice was dropped"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_policy": "sampling"}, r"router.second_policy='sampling' is unknown; use 'random' or 'all'"),
        ({"threshold": 0.0}, r"router.threshold=0.0 must lie in \(0, 1\]; set router.second_policy=all"),
        ({"threshold": 1.1}, r"router.threshold=1.1"),
        ({"balance_coef": -1.0}, r"router.balance_coef=-1.0 must not be negative"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, E, name="gshard", **options)


def test_needs_two_experts() -> None:
    with pytest.raises(ValueError, match=r"num_experts=1: router gshard chooses two experts"):
        make_router(4, 1, name="gshard")
