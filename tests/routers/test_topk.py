"""Top-k gate: identities of the literature, its gradient, and its options."""

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.routing import make_router
from torch import Tensor

T, E = 33, 8


def weight_gradient(options: dict, logits_TE: Tensor, token: int = 0) -> tuple[Tensor, list[int]]:
    """d(first chosen weight)/d(logits) of one token, and its chosen experts."""
    router = make_router(E, E, logits=True, **options)
    x_TD = logits_TE.clone().requires_grad_()
    routing = router(x_TD)
    top_k = routing.top_k
    routing.weights_N[token * top_k].backward()
    return x_TD.grad[token], routing.expert_ids_N[token * top_k : (token + 1) * top_k].tolist()


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_against_the_loop(top_k: int, renormalize: bool) -> None:
    if top_k == 1 and renormalize:
        pytest.skip("refused; see test_bad_options")
    router = make_router(5, E, top_k=top_k, renormalize=renormalize)
    x_TD = torch.randn(T, 5, requires_grad=True)
    routing = router(x_TD)
    upstream_N = torch.randn(T * top_k)
    routing.weights_N.backward(upstream_N)

    x64_TD, weight_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, router.weight))
    ids, weights_N = oracles.softmax_topk(x64_TD @ weight_ED.T, top_k, renormalize)
    weights_N.backward(upstream_N.double())
    assert routing.expert_ids_N.tolist() == ids
    assert_close("weights", routing.weights_N, weights_N, torch.float32)
    if top_k < E or not renormalize:
        assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)
        assert_close("dweight", router.weight.grad, weight_ED.grad, torch.float32)


def test_worked_values() -> None:
    """The example of the fact sheet: full weights .31 and .28, renormalised .525 and .475."""
    probs_E = torch.tensor([0.07, 0.31, 0.06, 0.05, 0.28, 0.08, 0.09, 0.06])
    x_TD = probs_E.log()[None]
    for options, expected in (({"renormalize": False}, [0.31, 0.28]), ({}, [0.31 / 0.59, 0.28 / 0.59])):
        routing = make_router(E, E, logits=True, **options)(x_TD)
        assert routing.expert_ids_N.tolist() == [1, 4]
        assert routing.weights_N.tolist() == pytest.approx(expected, abs=1e-6)


def test_softmax_then_topk_then_renormalise_is_topk_then_softmax() -> None:
    before = make_router(5, E, top_k=3, softmax_order="before")
    after = make_router(5, E, top_k=3, softmax_order="after")
    after.load_state_dict(before.state_dict())
    upstream_N = torch.randn(T * 3)
    results = []
    for router in (before, after):
        x_TD = torch.linspace(-2, 2, T * 5).sin().view(T, 5).requires_grad_()
        routing = router(x_TD)
        routing.weights_N.backward(upstream_N)
        results.append((routing, x_TD.grad, router.weight.grad))
    assert torch.equal(results[0][0].expert_ids_N, results[1][0].expert_ids_N)
    assert_close("weights", results[0][0].weights_N, results[1][0].weights_N, torch.float32)
    torch.testing.assert_close(results[0][1:], results[1][1:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_unselected_logits_get_no_gradient_when_renormalised(order: str) -> None:
    grad_E, chosen = weight_gradient({"softmax_order": order, "top_k": 3}, torch.randn(T, E))
    others = [e for e in range(E) if e not in chosen]
    # Exact for "after"; "before" cancels terms of order one.
    assert grad_E[others].abs().max() <= (0 if order == "after" else 1e-8)
    assert grad_E[chosen].abs().min() > 1e-3


def test_unselected_logits_are_coupled_without_renormalisation() -> None:
    logits_TE = torch.randn(T, E)
    grad_E, chosen = weight_gradient({"renormalize": False}, logits_TE)
    probs_E = logits_TE[0].softmax(-1)
    expected_E = -probs_E[chosen[0]] * probs_E
    expected_E[chosen[0]] += probs_E[chosen[0]]
    torch.testing.assert_close(grad_E, expected_E)


def test_sigmoid_weights() -> None:
    x_TD = torch.randn(T, E)
    for renormalize in (True, False):
        routing = make_router(E, E, logits=True, score="sigmoid", top_k=3, renormalize=renormalize)(x_TD)
        chosen_TK = x_TD.sigmoid().topk(3).values
        expected_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True) if renormalize else chosen_TK
        torch.testing.assert_close(routing.weights_N.view(T, 3), expected_TK)
    scores_TE = x_TD.sigmoid()
    torch.testing.assert_close(routing.probs_TE, scores_TE / scores_TE.sum(-1, keepdim=True))
    assert torch.equal(routing.logits_TE, x_TD)


def test_route_scale_and_sum_of_weights() -> None:
    x_TD = torch.randn(T, E)
    for options in ({}, {"softmax_order": "after"}, {"score": "sigmoid"}):
        routing = make_router(E, E, logits=True, top_k=3, route_scale=2.5, **options)(x_TD)
        torch.testing.assert_close(routing.weights_N.view(T, 3).sum(-1), torch.full((T,), 2.5))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_changes_the_choice_and_never_the_weight(score: str) -> None:
    router = make_router(E, E, logits=True, score=score, selection_bias=True, renormalize=False)
    x_TD = torch.randn(T, E, requires_grad=True)
    plain = router(x_TD)
    router.bias_E[6] = 10.0
    biased = router(x_TD)
    assert not torch.equal(plain.expert_ids_N, biased.expert_ids_N)
    assert (biased.expert_ids_N.view(T, 2)[:, 0] == 6).all()
    scores_TE = x_TD.detach().softmax(-1) if score == "softmax" else x_TD.detach().sigmoid()
    torch.testing.assert_close(biased.weights_N.view(T, 2), scores_TE.gather(1, biased.expert_ids_N.view(T, 2)))
    assert torch.equal(plain.probs_TE, biased.probs_TE)
    router.bias_E.fill_(3.0)  # the same for all: no change at all
    assert torch.equal(router(x_TD).expert_ids_N, plain.expert_ids_N)


def test_bias_acts_on_probabilities_not_logits() -> None:
    router = make_router(E, E, logits=True, selection_bias=True)
    x_TD = torch.tensor([[0.0, -1, -2, -3, -4, -5, -6, -7]]) * 3  # p = .95, .047, .0024, ...
    router.bias_E[7] = 0.01  # beats p_2 = .0024, not p_1
    assert router(x_TD).expert_ids_N.tolist() == [0, 1]
    router.bias_E[7] = 0.1  # beats p_1
    assert router(x_TD).expert_ids_N.tolist() == [0, 7]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_groups_without_bias_go_by_their_best_expert(score: str) -> None:
    router = make_router(E, E, logits=True, score=score, num_groups=4, top_k_groups=2, top_k=3)
    x_TD = torch.randn(200, E)
    expected = [e for row in x_TD.tolist() for e in oracles.group_limited_choice(row, 4, 2, 3, num_best=1)]
    assert router(x_TD).expert_ids_N.tolist() == expected
    free = make_router(E, E, logits=True, score=score, top_k=3)
    assert free(x_TD).expert_ids_N.tolist() != expected, "the groups did not limit anything"


def test_jitter_only_in_training_and_only_on_the_routers_input() -> None:
    router = make_router(E, E, logits=True, jitter=0.1)
    x_TD = torch.rand(50, E) + 1
    before = x_TD.clone()
    first, second = router(x_TD), router(x_TD)
    assert torch.equal(x_TD, before)
    ratio_TE = first.logits_TE / x_TD
    assert not torch.equal(first.logits_TE, second.logits_TE)
    assert 0.9 <= ratio_TE.min() < 0.92
    assert 1.08 < ratio_TE.max() <= 1.1
    assert ratio_TE.std(0).min() > 0.03, "each element has its own factor"
    assert ratio_TE.std(1).min() > 0.01
    router.eval()
    assert torch.equal(router(x_TD).logits_TE, x_TD)


def test_bias_stays_in_fp32() -> None:
    """Steps of 1e-3 vanish in bf16, and a trainer may convert the whole model."""
    router = make_router(E, E, name="topk", selection_bias=True)
    router.bias_E.fill_(1.001)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias_E.dtype == torch.float32
    assert router.bias_E[0].item() == pytest.approx(1.001, abs=1e-6)
    with torch.device("meta"):
        empty = make_router(E, E, name="topk", selection_bias=True)
    assert empty.to(torch.bfloat16).to_empty(device="cpu").bias_E.device.type == "cpu"
    assert dict(router.named_buffers())["bias_E"] is router.bias_E


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"router.top_k=0 must be at least 1"),
        ({"top_k": 9}, r"router.top_k=9 is more than num_experts=8; lower it or add experts"),
        ({"top_k": 1}, r"router.top_k=1 with renormalised weights.*no gradient.*renormalize=false.*switch"),
        ({"top_k": 1, "renormalize": False, "softmax_order": "after"}, r"router.top_k=1.*softmax_order=before"),
        ({"top_k": 1, "score": "sigmoid"}, r"router.top_k=1 with renormalised weights"),
        ({"score": "tanh"}, r"router.score='tanh' is unknown; use 'softmax' or 'sigmoid'"),
        ({"softmax_order": "both"}, r"router.softmax_order='both' is unknown; use 'before' or 'after'"),
        ({"num_groups": 3}, r"num_experts=8 is not divisible by router.num_groups=3"),
        ({"num_groups": 2, "top_k_groups": 3}, r"router.top_k_groups=3 must lie between 1 and router.num_groups=2"),
        ({"num_groups": 2, "top_k_groups": 0}, r"router.top_k_groups=0 must lie between 1"),
        ({"num_groups": 0}, r"router.num_groups=0"),
        ({"num_groups": 4, "top_k": 3}, r"router.top_k=3 is more than the 2 experts in router.top_k_groups=1 of 4"),
        ({"jitter": 1.0}, r"router.jitter=1.0 must lie in \[0, 1\)"),
        ({"jitter": -0.1}, r"router.jitter=-0.1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, 8, name="topk", **options)


def test_single_choice_that_learns_is_allowed() -> None:
    for options in ({"renormalize": False}, {"renormalize": False, "score": "sigmoid"}):
        router = make_router(E, E, logits=True, top_k=1, **options)
        routing = router(torch.randn(T, E))
        routing.weights_N.sum().backward()
        assert router.weight.grad.abs().max() > 1e-3


def test_frozen_gate_may_have_weight_one_and_gets_no_gradient() -> None:
    router = make_router(E, E, logits=True, name="topk", top_k=1, frozen=True)
    x_TD = torch.randn(T, E, requires_grad=True)
    routing = router(x_TD)
    assert torch.equal(routing.weights_N, torch.ones(T))
    assert torch.equal(routing.expert_ids_N, x_TD.argmax(-1))
    assert not router.weight.requires_grad
