"""CMoE's gate (arXiv 2502.04416): scores of representative neurons, weights near 1."""

import math

import pytest
import torch
from helpers.fitting import check_training, one_model_step
from helpers.routing import make_router

T, D, E, K = 17, 5, 6, 3


def router_of(**options: object) -> torch.nn.Module:
    """With weights, u and b that matter."""
    router = make_router(D, E, name="cmoe", top_k=K, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
        router.bias_E.normal_(std=0.2)
    return router


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def test_against_the_loop() -> None:
    router, x_TD = router_of(), torch.randn(T, D)
    routing = router(x_TD)
    for token, x_D in enumerate(x_TD.double()):
        scores = [
            abs(float(up_D.double() @ x_D) * silu(float(gate_D.double() @ x_D)))
            for gate_D, up_D in zip(router.weight.detach(), router.up_weight.detach(), strict=True)
        ]
        total = sum(math.exp(score) for score in scores)
        probs = [math.exp(score) / total for score in scores]
        biased = [p + b for p, b in zip(probs, router.bias_E.tolist(), strict=True)]
        chosen = sorted(range(E), key=lambda e: -biased[e])[:K]
        rows = slice(token * K, (token + 1) * K)
        assert routing.expert_ids_N[rows].tolist() == chosen
        expected = [1 + probs[e] * router.scale[e].item() for e in chosen]
        assert routing.weights_N[rows].tolist() == pytest.approx(expected, abs=1e-5)
        assert routing.logits_TE[token].tolist() == pytest.approx(scores, abs=1e-5)


def test_weights_are_exactly_one_until_u_moves() -> None:
    router = make_router(D, E, name="cmoe", top_k=K)
    assert (router(torch.randn(T, D)).weights_N == 1).all()
    router.scale.data.fill_(0.5)
    router.reset_parameters(0.02)
    assert (router(torch.randn(T, D)).weights_N == 1).all()


def test_gradients() -> None:
    """Against autograd of the formula, in float64."""
    router, x_TD = router_of(), torch.randn(T, D, requires_grad=True)
    routing = router(x_TD)
    upstream_N = torch.randn(T * K)
    (routing.weights_N * upstream_N).sum().backward()
    gate, up, u, x = (
        tensor.detach().double().requires_grad_() for tensor in (router.weight, router.up_weight, router.scale, x_TD)
    )
    scores_TE = ((x @ up.T) * torch.nn.functional.silu(x @ gate.T)).abs().softmax(-1)
    weights_TE = 1 + scores_TE * u
    picked_N = weights_TE[routing.token_ids_N, routing.expert_ids_N]
    (picked_N * upstream_N).sum().backward()
    pairs = ((router.weight, gate), (router.up_weight, up), (router.scale, u), (x_TD, x))
    for got, expected in pairs:
        torch.testing.assert_close(got.grad, expected.grad.float(), atol=1e-5, rtol=1e-4)


def test_the_selection_bias_never_changes_a_weight() -> None:
    router, x_TD = router_of(), torch.randn(T, D)
    router.bias_E.zero_()
    router.bias_E[2] = 10.0
    routing = router(x_TD)
    assert (routing.expert_ids_N[::K] == 2).all()
    probs_T = routing.logits_TE.softmax(-1)[:, 2]
    torch.testing.assert_close(routing.weights_N[::K], 1 + probs_T * router.scale[2])


@pytest.mark.parametrize(
    ("option", "value"), [("score", "sigmoid"), ("renormalize", True), ("route_scale", 2.0), ("softmax_order", "after")]
)
def test_what_is_fixed(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"router.{option}={value!r} does not go with router cmoe"):
        make_router(D, E, name="cmoe", top_k=2, **{option: value})


def test_frozen() -> None:
    assert not any(parameter.requires_grad for parameter in make_router(D, E, name="cmoe", frozen=True).parameters())


def test_it_trains() -> None:
    check_training({"name": "cmoe", "top_k": 2}, num_experts=4)
    one_model_step({"name": "cmoe"})
