"""Modified softmax gate (arXiv 2310.14188): a bounded transform, in the gate only."""

import math

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.fitting import check_training, one_model_step
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor

T, D, E = 33, 5, 8
TRANSFORMS = ("sigmoid", "tanh", "normalize")


def transformed(x_D: Tensor, kind: str) -> list[float]:
    values = x_D.tolist()
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in values]
    if kind == "tanh":
        return [math.tanh(v) for v in values]
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def biased_router(**options: object) -> torch.nn.Module:
    router = make_router(D, E, name="modified_softmax", **options)
    with torch.no_grad():
        router.weight.normal_()
        router.bias.normal_()
    return router


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_logits_against_the_loop(kind: str) -> None:
    router, x_TD = biased_router(transform=kind), torch.randn(T, D)
    expected = [
        [
            sum(w * m for w, m in zip(row, transformed(x_D, kind), strict=True)) + b
            for row, b in zip(router.weight.tolist(), router.bias.tolist(), strict=True)
        ]
        for x_D in x_TD
    ]
    logits_TE = router(x_TD).logits_TE
    torch.testing.assert_close(logits_TE, torch.tensor(expected), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(router(x_TD).probs_TE, logits_TE.softmax(-1))


def test_transforms_are_bounded() -> None:
    x_TD = torch.randn(T, D)
    for kind in TRANSFORMS:
        router = biased_router(transform=kind)
        bound_E = router.weight.abs().sum(-1) + router.bias.abs()
        assert (router(1e4 * x_TD).logits_TE.abs() <= bound_E + 1e-5).all()
    torch.testing.assert_close(router(3 * x_TD).logits_TE, router(x_TD).logits_TE)  # only the direction counts


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_experts_see_the_token_itself(kind: str) -> None:
    layer = make_layer(D, router={"name": "modified_softmax", "transform": kind})
    x_TD = torch.randn(9, D)
    routing = layer.router(x_TD)
    expected_TD = oracles.expert_ffn(
        x_TD.double(),
        routing.token_ids_N.tolist(),
        routing.expert_ids_N.tolist(),
        routing.weights_N.detach().double(),
        layer.experts.gate_up_proj.detach().double(),
        layer.experts.down_proj.detach().double(),
        "swiglu",
    )
    assert_close("y", layer(x_TD), expected_TD, torch.float32)


def test_a_zero_token_has_the_bias_as_logits_and_a_bounded_gradient() -> None:
    for kind, offset in (("tanh", 0.0), ("normalize", 0.0), ("sigmoid", 0.5)):
        router = biased_router(transform=kind)
        x_TD = torch.zeros(3, D, requires_grad=True)
        logits_TE = router(x_TD).logits_TE
        torch.testing.assert_close(logits_TE[0], router.bias + offset * router.weight.sum(-1))
        logits_TE[:, 0].sum().backward()
        assert x_TD.grad.abs().max() < 1e4


def test_bias_starts_at_zero_learns_and_decides() -> None:
    router = make_router(D, E, name="modified_softmax")
    assert (router.bias == 0).all()
    x_TD = torch.randn(T, D)
    router(x_TD).weights_N[::2].sum().backward()
    assert router.bias.grad.abs().max() > 1e-3
    with torch.no_grad():
        router.bias[3] = 100.0
    assert (router(x_TD).expert_ids_N[::2] == 3).all()
    router.reset_parameters(0.02)
    assert (router.bias == 0).all()


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"router.transform='relu' is unknown; use one of sigmoid, tanh, normalize"):
        make_router(D, E, name="modified_softmax", transform="relu")
    with pytest.raises(ValueError, match=r"router.top_k=1 with renormalised weights"):
        make_router(D, E, name="modified_softmax", top_k=1)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_it_trains(kind: str) -> None:
    check_training({"name": "modified_softmax", "transform": kind})
    one_model_step({"name": "modified_softmax", "transform": kind})
