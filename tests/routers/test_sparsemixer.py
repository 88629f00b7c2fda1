"""SparseMixer (arXiv 2310.00811): its gradient in expectation by enumeration, its mask, factors, and evaluation."""

import pytest
import torch
from helpers.estimators import (
    BEST,
    EXPERTS_ED,
    KEPT_E,
    LOGITS_E,
    E,
    exact,
    expected,
    gradient,
    polynomial,
    relative_error,
)
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor

from moe.routers.sparsemixer import MIDPOINT, choose, masked_softmax, near_best, sample

EXACT = 1e-12


@pytest.mark.parametrize("degree", [1, 2])
def test_exact_up_to_quadratic_losses(degree: int) -> None:
    for seed in range(5):
        loss = polynomial(degree, seed)
        assert relative_error(expected(loss, MIDPOINT), exact(loss)) < EXACT


@pytest.mark.parametrize("degree", [3, 4])
def test_not_exact_beyond(degree: int) -> None:
    for seed in range(5):
        loss = polynomial(degree, seed)
        assert relative_error(expected(loss, MIDPOINT), exact(loss)) > 1e-4


def test_the_argmax_rule_is_exact_for_linear_losses_only() -> None:
    assert relative_error(expected(polynomial(1), MIDPOINT, argmax_rule=True), exact(polynomial(1))) < EXACT
    assert relative_error(expected(polynomial(2), MIDPOINT, argmax_rule=True), exact(polynomial(2))) > 1e-2


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_top_k_and_sampling_alone_are_far_off(degree: int) -> None:
    """Both treat the index as a constant, so that the term f(h) - f(0) is missing."""
    loss, chances_E = polynomial(degree), masked_softmax(LOGITS_E, KEPT_E)

    def gated(drawn: int) -> Tensor:
        return gradient(lambda probs_E: loss(probs_E[drawn] * EXPERTS_ED[drawn : drawn + 1]).sum())

    sampled = sum(chances_E[i] * gated(i) for i in range(E))
    for got in (gated(BEST), sampled):
        assert relative_error(got, exact(loss)) > 0.2


@pytest.mark.parametrize("chosen_only", [False, True])
def test_straight_through_is_far_off(chosen_only: bool) -> None:
    """One-hot forward, softmax backward, against its own objective sum_i p_i f(E_i)."""
    loss, hot_EE, chances_E = polynomial(2), torch.eye(E, dtype=torch.float64), masked_softmax(LOGITS_E, KEPT_E)

    def value(probs_E: Tensor, drawn: int) -> Tensor:
        soft_E = probs_E * hot_EE[drawn] if chosen_only else probs_E
        return loss((hot_EE[drawn] + soft_E - soft_E.detach())[None] @ EXPERTS_ED).sum()

    got = sum(chances_E[i] * gradient(lambda probs_E, i=i: value(probs_E, i)) for i in range(E))
    assert relative_error(got, gradient(lambda probs_E: (probs_E * loss(EXPERTS_ED)).sum())) > 0.2


@pytest.mark.parametrize(
    ("logits", "kept"),
    [
        ([1.0, 0.85, 0.79, -3.0], [True, True, False, False]),  # .15 / 1, .21 / 1, 4 / 3
        ([-1.0, -1.2, -1.3, -9.0], [True, True, False, False]),  # .2 / 1.2 = .167, .3 / 1.3 = .23: |z_i| divides
        ([0.0, 0.0, 0.0, 0.0], [True, True, True, True]),  # 0 / 0
        ([0.0, -1e-6, 0.0, -5.0], [True, False, True, False]),  # 1e-6 / 1e-6 = 1
        ([2e4, 1.9e4, -2e4, 0.0], [True, True, False, False]),
    ],
)
def test_mask(logits: list[float], kept: list[bool]) -> None:
    assert near_best(torch.tensor([logits]), 0.1).tolist() == [kept]
    assert near_best(torch.tensor([logits]) * 3.7, 0.1).tolist() == [kept], "not free of scale"


def test_mask_at_its_ends_and_among_the_allowed() -> None:
    logits_TE = torch.randn(200, E).round(decimals=1)
    best_TE = logits_TE == logits_TE.amax(-1, keepdim=True)
    assert torch.equal(near_best(logits_TE, 0.0), best_TE)
    assert near_best(logits_TE, 1.0).all()
    assert (near_best(logits_TE, 0.1) & best_TE).sum() == best_TE.sum()
    allowed_TE = torch.tensor([[False, True, True]])
    assert near_best(torch.tensor([[9.0, 1.0, 0.9]]), 0.1, allowed_TE).tolist() == [[False, True, True]]


def test_draws_follow_the_probabilities() -> None:
    probs_E = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    num_draws = 50_000
    torch.manual_seed(0)
    counts_E = torch.bincount(sample(probs_E.expand(num_draws, -1)), minlength=E)
    sigma_E = (probs_E * (1 - probs_E) * num_draws).sqrt()
    assert ((counts_E - probs_E * num_draws).abs() <= 5 * sigma_E).all()


def test_forward_factors_and_backward_gain() -> None:
    """Forward p or p / 2, p where the best is drawn; backward always twice the gradient of p."""
    num_tokens = 20_000
    logits_TE = torch.tensor([[1.0, 0.9, 0.85, -1.0]]).repeat(num_tokens, 1).requires_grad_()
    torch.manual_seed(4)
    choice = choose(logits_TE, near_best(logits_TE, 0.1), MIDPOINT, training=True)
    chosen_T = choice.probs_TE.detach().gather(1, choice.ids_T[:, None])[:, 0]
    factors_T = choice.weights_T.detach() / chosen_T
    assert set(factors_T.tolist()) == {0.5, 1.0}
    is_best_T = choice.ids_T == 0
    assert (factors_T[is_best_T] == 1).all()
    others_T = factors_T[~is_best_T]
    assert abs((others_T == 1).double().mean().item() - 0.5) < 5 * 0.5 / others_T.numel() ** 0.5
    assert (choice.ids_T < 3).all(), "a masked expert was drawn"

    choice.weights_T.sum().backward()
    probs_TE = logits_TE.detach().masked_fill(torch.arange(4) == 3, float("-inf")).softmax(-1)
    hot_TE = torch.nn.functional.one_hot(choice.ids_T, 4)
    torch.testing.assert_close(logits_TE.grad, 2 * chosen_T[:, None] * (hot_TE - probs_TE))


def test_evaluation_takes_the_best_at_its_full_probability() -> None:
    router = make_router(E, E, logits=True, name="sparsemixer").eval()
    x_TD = torch.randn(300, E, requires_grad=True)
    routing = router(x_TD)
    expected_TE = masked_softmax(x_TD.detach(), near_best(x_TD, 0.1))
    assert torch.equal(routing.expert_ids_N, x_TD.argmax(-1))
    assert torch.equal(routing.weights_N, expected_TE.max(-1).values)
    routing.weights_N.sum().backward()
    top_T1 = expected_TE.max(-1, keepdim=True).values
    torch.testing.assert_close(x_TD.grad, -top_T1 * expected_TE + top_T1 * (expected_TE == top_T1))


def test_routing_keeps_clean_logits_and_masked_probabilities() -> None:
    router = make_router(E, E, logits=True, name="sparsemixer")
    x_TD = torch.randn(300, E)
    before_TD = x_TD.clone()
    routing = router(x_TD)
    assert torch.equal(x_TD, before_TD)
    assert torch.equal(routing.logits_TE, before_TD)
    kept_TE = near_best(x_TD, 0.1)
    assert torch.equal(routing.probs_TE > 0, kept_TE)
    assert kept_TE.sum(-1).float().mean() > 1.1, "nothing to draw from"
    assert kept_TE[torch.arange(300), routing.expert_ids_N].all()
    assert not torch.equal(routing.expert_ids_N, router(x_TD).expert_ids_N)


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_extreme_logits(scale: float) -> None:
    router = make_router(E, E, logits=True, name="sparsemixer")
    x_TD = (scale * torch.rand(50, E)).requires_grad_()
    routing = router(x_TD)
    routing.weights_N.sum().backward()
    assert routing.weights_N.isfinite().all()
    assert x_TD.grad.isfinite().all()
    if scale == 0:
        assert (routing.probs_TE == 1 / E).all()


def test_output_scale_multiplies_the_routed_output() -> None:
    layer = make_layer(6, router={"name": "sparsemixer"}).eval()
    plain = make_layer(6, router={"name": "sparsemixer", "output_scale": False}).eval()
    assert (layer.router.output_scale_D == 1).all()
    assert plain.router.output_scale_D is None
    state = layer.state_dict()
    del state["router.output_scale_D"]
    plain.load_state_dict(state)
    x_TD = torch.randn(20, 6)
    torch.testing.assert_close(layer(x_TD), plain(x_TD))
    with torch.no_grad():
        layer.router.output_scale_D.copy_(torch.arange(6.0))
    torch.testing.assert_close(layer(x_TD), plain(x_TD) * torch.arange(6.0))
    layer.train()(x_TD).sum().backward()
    assert layer.router.output_scale_D.grad.abs().min() > 0
    layer.router.reset_parameters(0.1)
    assert (layer.router.output_scale_D == 1).all()


def test_bad_options() -> None:
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"router.jitter_eps={value} must lie in \[0, 1\]"):
            make_router(4, E, name="sparsemixer", jitter_eps=value)
