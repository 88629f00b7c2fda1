"""Dense-to-sparse gate: threshold, switch to one expert, the activation gate."""

import math

import pytest
import torch
from helpers.fitting import check_training, fit_layer, one_model_step
from helpers.routing import make_router
from torch import Tensor

from moe.routers.base import Router, StepLoad
from moe.routers.gumbel import gumbel_noise
from moe.routers.losses import switch_loss

T, E = 200, 5


def gate(**options: object) -> Router:
    return make_router(E, E, logits=True, name="dense_to_sparse", **options)


def constant(temperature: float) -> dict[str, float]:
    return {"temperature_start": temperature, "temperature_end": temperature}


def finish_steps(router: Router, count: int) -> None:
    for _ in range(count):
        router.after_step(
            StepLoad(counts_E=torch.zeros(E, dtype=torch.int64), model_density=None, reduce=lambda tensor: tensor)
        )


def drawn(x_TD: Tensor, temperature: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return ((x_TD + gumbel_noise(x_TD)) / temperature).softmax(-1)


def dense(routing: object) -> Tensor:
    weights_TE = torch.zeros(T, E)
    return weights_TE.index_put((routing.token_ids_N, routing.expert_ids_N), routing.weights_N)


def test_soft_phase_uses_the_draws_above_the_threshold() -> None:
    router, x_TD = gate(threshold=0.3, **constant(0.8)), torch.randn(T, E)
    y_TE = drawn(x_TD, 0.8, 4)
    torch.manual_seed(4)
    routing = router(x_TD)
    best_TE = torch.zeros(T, E, dtype=torch.bool).scatter(1, y_TE.argmax(-1, keepdim=True), True)
    kept_TE = (y_TE > 0.3) | best_TE
    assert (y_TE.max(-1).values <= 0.3).any(), "no token below the threshold"
    torch.testing.assert_close(dense(routing), y_TE * kept_TE)
    assert len(routing.weights_N) == kept_TE.sum()
    torch.testing.assert_close(routing.probs_TE, x_TD.softmax(-1))


def test_gate_gets_sparser_as_the_temperature_falls() -> None:
    router = gate(temperature_start=5.0, temperature_end=0.05, temperature_steps=4)
    x_TD, listed = torch.randn(T, E), []
    for _ in range(5):
        listed.append(len(router(x_TD).weights_N) / T)
        finish_steps(router, 1)
    assert listed == sorted(listed, reverse=True)
    assert listed[0] == E
    assert listed[-1] < 1.5


@pytest.mark.parametrize("training", [True, False])
def test_switch_to_the_best_expert(training: bool) -> None:
    router, x_TD = gate(hard_after=3, **constant(0.8)).train(training), torch.randn(T, E)
    y_TE = drawn(x_TD, 0.8, 4) if training else (x_TD / 0.8).softmax(-1)
    for step in range(5):
        torch.manual_seed(4)
        routing = router(x_TD)
        if step < 3:
            assert len(routing.weights_N) > 3 * T
        else:
            assert routing.expert_ids_N.tolist() == y_TE.argmax(-1).tolist()
            torch.testing.assert_close(routing.weights_N, y_TE.max(-1).values)
        finish_steps(router, 1)


def test_it_may_never_switch() -> None:
    router = gate(hard_after=None)
    finish_steps(router, 20_000)
    assert len(router(torch.randn(T, E)).weights_N) > 3 * T
    assert (router.mean_experts_per_token, gate().mean_experts_per_token) == (E, 1)


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("sigmoid", lambda v: 1 / (1 + math.exp(-v))),
        ("tanh", math.tanh),
        ("gelu", lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
    ],
)
def test_activation_gate(name: str, sigma: object) -> None:
    """softmax(sigma(x b1) / tau + b0), the temperature on the activation alone."""
    router = gate(activation=name, threshold=0.0, **constant(0.4)).eval()
    with torch.no_grad():
        router.bias.normal_()
    x_TD = torch.randn(T, E)
    scores_TE = torch.tensor([[sigma(v) for v in row] for row in x_TD.tolist()])
    routing = router(x_TD)
    torch.testing.assert_close(dense(routing), (scores_TE / 0.4 + router.bias).softmax(-1))
    torch.testing.assert_close(routing.logits_TE, scores_TE + 0.4 * router.bias)


def test_plain_gate_has_no_bias_and_the_activation_gates_learns() -> None:
    assert {name for name, _ in gate().named_parameters()} == {"weight"}
    router = gate(activation="tanh")
    assert (router.bias == 0).all()
    router(torch.randn(T, E)).weights_N.square().sum().backward()
    assert router.bias.grad.abs().max() > 1e-2
    assert router.weight.grad.abs().max() > 1e-2


def test_the_balance_loss_of_evomoe_is_the_switch_loss() -> None:
    """With one expert per token, E^2 mean(me * ce) for gates me and shares ce is what the layer adds."""
    routing = gate(hard_after=0)(torch.randn(T, E))
    me_E, ce_E = routing.probs_TE.mean(0), routing.counts_E / T
    expected = E**2 * (me_E * ce_E).mean()
    torch.testing.assert_close(switch_loss(routing.probs_TE, routing.counts_E), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"router.threshold=1.0 must lie in \[0, 1\)"),
        ({"threshold": -0.1}, r"router.threshold=-0.1"),
        ({"hard_after": -1}, r"router.hard_after=-1 must not be negative; null never switches"),
        ({"activation": "relu"}, r"router.activation='relu' is unknown; use one of none, sigmoid, tanh, gelu"),
        ({"temperature_steps": 0}, r"router.temperature_start=1.0 is never used"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(**options)


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_it_trains(activation: str) -> None:
    router = {"name": "dense_to_sparse", "activation": activation}
    check_training(router)
    one_model_step(router)


def test_training_goes_from_many_experts_to_one() -> None:
    router = {"name": "dense_to_sparse", "temperature_end": 0.1, "temperature_steps": 60, "hard_after": 60}
    densities = fit_layer(80, router=router).densities
    assert densities[0] > 0.95
    assert 0.3 < densities[59] < 0.8
    assert densities[60:] == [0.25] * 20
