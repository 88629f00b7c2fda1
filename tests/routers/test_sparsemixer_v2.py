"""SparseMixer-v2 (arXiv 2409.12136 appendix A): its gradient by enumeration, passes without replacement, evaluation."""

import pytest
import torch
from helpers.estimators import E, exact, expected, polynomial, relative_error
from helpers.routing import make_router

from moe.routers.sparsemixer import Rule, choose, masked_softmax, near_best
from moe.routers.sparsemixer_v2 import HEUN, HEUN_CORRECTED

EXACT = 1e-12
BOTH = pytest.mark.parametrize(("rule", "hold_weight"), [(HEUN, True), (HEUN_CORRECTED, False)], ids=["v2", "v2*"])


@BOTH
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_exact_up_to_cubic_losses(rule: Rule, hold_weight: bool, degree: int) -> None:
    for seed in range(5):
        loss = polynomial(degree, seed)
        assert relative_error(expected(loss, rule), exact(loss, hold_weight)) < EXACT


@BOTH
def test_not_exact_beyond_nor_with_the_argmax_rule(rule: Rule, hold_weight: bool) -> None:
    errors = [relative_error(expected(polynomial(4), rule), exact(polynomial(4), hold_weight))]
    errors += [
        relative_error(expected(polynomial(degree), rule, argmax_rule=True), exact(polynomial(degree), hold_weight))
        for degree in (1, 2)
    ]
    assert errors[0] > 1e-4
    assert errors[1] < EXACT
    assert errors[2] > 1e-2


def test_released_objective_is_not_the_trained_one() -> None:
    """v2 leaves out f'(h) h: half of the gradient where the loss is linear."""
    torch.testing.assert_close(2 * exact(polynomial(1), hold_weight=True), exact(polynomial(1)))
    assert relative_error(expected(polynomial(2), HEUN), exact(polynomial(2))) > 0.2


@pytest.mark.parametrize("corrected", [False, True])
def test_forward_factors_and_gradient_of_each_pass(corrected: bool) -> None:
    """Forward p or p / 3; the gradient is that of p (of 2 p at temperature 2), and never reaches earlier experts."""
    router = make_router(4, 4, logits=True, name="sparsemixer_v2", jitter_eps=0.2, corrected=corrected)
    gain, temperature, full_chance = (2.0, 2.0, 5 / 8) if corrected else (1.0, 1.0, 1 / 4)
    num_tokens = 20_000
    x_TD = torch.tensor([[1.0, 0.9, 0.7, -1.0]]).repeat(num_tokens, 1).requires_grad_()
    torch.manual_seed(5)
    routing = router(x_TD)
    ids_TK, weights_TK = routing.expert_ids_N.view(-1, 2), routing.weights_N.view(-1, 2)
    allowed_TE = torch.ones(num_tokens, 4, dtype=torch.bool)
    for k in range(2):
        kept_TE = near_best(x_TD, 0.2, allowed_TE)
        probs_TE = (x_TD.detach() / temperature).masked_fill(~kept_TE, float("-inf")).softmax(-1)
        prob_T = probs_TE.gather(1, ids_TK[:, k : k + 1])[:, 0]
        factors_T = weights_TK[:, k].detach() / prob_T
        is_full_T = (factors_T - 1).abs() < 1e-6
        assert ((factors_T - 1 / 3)[~is_full_T].abs() < 1e-6).all()
        is_best_T = ids_TK[:, k] == x_TD.detach().masked_fill(~allowed_TE, float("-inf")).argmax(-1)
        assert is_full_T[is_best_T].all()
        others_T = is_full_T[~is_best_T].double()
        assert abs(others_T.mean().item() - full_chance) < 5 * 0.5 / others_T.numel() ** 0.5

        (grad_TE,) = torch.autograd.grad(weights_TK[:, k].sum(), x_TD, retain_graph=True)
        hot_TE = torch.nn.functional.one_hot(ids_TK[:, k], 4)
        torch.testing.assert_close(grad_TE, gain / temperature * prob_T[:, None] * (hot_TE - probs_TE))
        assert (grad_TE[~allowed_TE] == 0).all()
        allowed_TE = allowed_TE.scatter(1, ids_TK[:, k : k + 1], False)
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    assert ids_TK[:, 0].unique().tolist() == [0, 1, 2]
    assert 3 not in ids_TK


def test_second_pass_has_a_mask_of_its_own() -> None:
    """Logits 1, .5, .45: only the first is near the best, and both others are once it is gone."""
    router = make_router(3, 3, logits=True, name="sparsemixer_v2")
    routing = router(torch.tensor([[1.0, 0.5, 0.45]]).repeat(2000, 1))
    ids_TK = routing.expert_ids_N.view(-1, 2)
    assert (ids_TK[:, 0] == 0).all()
    assert (routing.weights_N.view(-1, 2)[:, 0] == 1).all()
    assert ids_TK[:, 1].unique().tolist() == [1, 2]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_evaluation_takes_the_best_of_each_pass(top_k: int) -> None:
    router = make_router(E, E, logits=True, name="sparsemixer_v2", top_k=top_k).eval()
    x_TD = torch.randn(300, E)
    routing = router(x_TD)
    ids_TK, weights_TK = routing.expert_ids_N.view(-1, top_k), routing.weights_N.view(-1, top_k)
    assert torch.equal(ids_TK, x_TD.topk(top_k).indices)
    left_TE = x_TD.clone()
    for k in range(top_k):
        allowed_TE = left_TE > -torch.inf
        kept_TE = near_best(x_TD, 0.1, allowed_TE)
        torch.testing.assert_close(weights_TK[:, k], masked_softmax(x_TD, kept_TE).max(-1).values)
        left_TE.scatter_(1, ids_TK[:, k : k + 1], -torch.inf)


def test_gradient_is_that_of_the_released_backward() -> None:
    """dz_j = upstream * p_D * (1[j = D] - p_j), with the unscaled p whatever the forward factor was."""
    logits_TE = torch.randn(400, E, requires_grad=True)
    choice = choose(logits_TE, near_best(logits_TE, 0.5), HEUN, training=True)
    upstream_T = torch.randn(400)
    choice.weights_T.backward(upstream_T)
    probs_TE = choice.probs_TE.detach()
    prob_T1 = probs_TE.gather(1, choice.ids_T[:, None])
    hot_TE = torch.nn.functional.one_hot(choice.ids_T, E)
    assert (choice.weights_T < 0.5 * prob_T1[:, 0]).any()
    torch.testing.assert_close(logits_TE.grad, upstream_T[:, None] * prob_T1 * (hot_TE - probs_TE))


def test_balance_probabilities_are_the_unmasked_softmax() -> None:
    for options in ({}, {"corrected": True}):
        router = make_router(E, E, logits=True, name="sparsemixer_v2", **options)
        x_TD = torch.randn(100, E)
        before_TD = x_TD.clone()
        routing = router(x_TD)
        assert torch.equal(routing.logits_TE, before_TD)
        assert torch.equal(x_TD, before_TD)
        torch.testing.assert_close(routing.probs_TE, before_TD.softmax(-1))


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("corrected", [False, True])
def test_extreme_logits(scale: float, corrected: bool) -> None:
    router = make_router(E, E, logits=True, name="sparsemixer_v2", top_k=3, corrected=corrected)
    x_TD = (scale * torch.rand(50, E)).requires_grad_()
    routing = router(x_TD)
    routing.weights_N.sum().backward()
    assert routing.weights_N.isfinite().all()
    assert x_TD.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"router.top_k=0 must be at least 1"),
        ({"top_k": 6}, r"router.top_k=6 is more than num_experts=5; lower it or add experts"),
        ({"jitter_eps": -0.1}, r"router.jitter_eps=-0.1 must lie in \[0, 1\]"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, E, name="sparsemixer_v2", **options)
