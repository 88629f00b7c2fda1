"""Gumbel-softmax routing: the law of the draws, the straight-through gradient, evaluation, the temperature."""

import math

import pytest
import torch
from helpers.close import assert_close
from helpers.fitting import check_training, one_model_step
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix
from moe.routers.base import Router, StepLoad
from moe.routers.gumbel import evaluation_noise, gumbel_noise, gumbel_softmax, mean_gumbel_softmax

T, E = 20, 5
Z = torch.tensor([1.0, 0.0, -1.0])
NUM_DRAWS = 200_000
# Mean of y and of its largest entry for the logits Z, by temperature (from 2e5 independent draws).
MEANS = {0.1: (0.662, 0.246, 0.092), 1.0: (0.569, 0.289, 0.143), 5.0: (0.400, 0.329, 0.271)}
MEAN_MAX = {0.1: 0.966, 1.0: 0.708, 5.0: 0.430}


def gumbel_router(logits: bool = True, **options: object) -> Router:
    return make_router(E, E, logits=logits, name="gumbel", **options)


def at_temperature(value: float, **options: object) -> dict[str, object]:
    return {"temperature_start": value, "temperature_end": value, **options}


def drawn(x_TD: Tensor, temperature: float, seed: int) -> Tensor:
    """(T, E) float64 y of the draw that a router makes after this seed."""
    torch.manual_seed(seed)
    noise_TE = gumbel_noise(x_TD.detach())
    return ((x_TD.double() + noise_TE.double()) / temperature).softmax(-1)


def test_noise_has_the_gumbel_distribution() -> None:
    noise_N = gumbel_noise(torch.empty(NUM_DRAWS)).double()
    sigma = math.pi / math.sqrt(6)
    assert noise_N.mean().item() == pytest.approx(0.5772156649, abs=5 * sigma / NUM_DRAWS**0.5)
    assert noise_N.std().item() == pytest.approx(sigma, rel=0.01)
    for quantile in (0.05, 0.5, 0.95):
        below = (noise_N < -math.log(-math.log(quantile))).double().mean().item()
        assert below == pytest.approx(quantile, abs=5 * 0.5 / NUM_DRAWS**0.5)


@pytest.mark.parametrize("temperature", MEANS)
def test_draws(temperature: float) -> None:
    """The largest entry is drawn from softmax(z) at every temperature; the mean of y is not softmax(z)."""
    y_NE = gumbel_softmax(Z, gumbel_noise(torch.empty(NUM_DRAWS, 3)), temperature)
    counts_E = y_NE.argmax(-1).bincount(minlength=3) / NUM_DRAWS
    torch.testing.assert_close(counts_E, Z.softmax(-1), atol=5 * 0.5 / NUM_DRAWS**0.5, rtol=0)
    # Both means come from 2e5 draws of deviation below 1/2, and one of them is rounded to 3 digits.
    tolerance = 5 * 2**0.5 * 0.5 / NUM_DRAWS**0.5 + 5e-4
    torch.testing.assert_close(y_NE.mean(0), torch.tensor(MEANS[temperature]), atol=tolerance, rtol=0)
    assert y_NE.max(-1).values.mean().item() == pytest.approx(MEAN_MAX[temperature], abs=tolerance)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_soft_weights_are_the_draw(temperature: float) -> None:
    router = gumbel_router(**at_temperature(temperature))
    x_TD = torch.randn(T, E, requires_grad=True)
    expected_TE = drawn(x_TD.detach().requires_grad_(), temperature, 7)
    torch.manual_seed(7)
    routing = router(x_TD)
    assert routing.counts_E.tolist() == [T] * E
    torch.testing.assert_close(routing.weights_N.view(T, E).double(), expected_TE, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(routing.probs_TE, x_TD.softmax(-1))
    assert torch.equal(routing.logits_TE, x_TD)


@pytest.mark.parametrize("mode", ["hard", "hard_all"])
def test_straight_through(mode: str) -> None:
    """Forward one-hot; backward dy_i/dz_j = y_i (1[i = j] - y_j) / tau, of the chosen expert alone or of all."""
    temperature = 0.7
    router = gumbel_router(mode=mode, **at_temperature(temperature))
    x_TD, upstream_TE = torch.randn(T, E, requires_grad=True), torch.randn(T, E)
    y_TE = drawn(x_TD.detach(), temperature, 3)
    torch.manual_seed(3)
    routing = router(x_TD)
    chosen_T = y_TE.argmax(-1)
    weights_TE = torch.zeros(T, E).index_put((routing.token_ids_N, routing.expert_ids_N), routing.weights_N)
    assert torch.equal(weights_TE, F.one_hot(chosen_T, E).float()), "exactly one-hot"
    assert routing.top_k == (1 if mode == "hard" else None)
    assert routing.counts_E.sum() == T * router.mean_experts_per_token == T * (1 if mode == "hard" else E)
    (weights_TE * upstream_TE).sum().backward()

    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    for t in range(T):
        for i in range(E) if mode == "hard_all" else [int(chosen_T[t])]:
            for j in range(E):
                expected_TE[t, j] += upstream_TE[t, i] * y_TE[t, i] * (float(i == j) - y_TE[t, j]) / temperature
    assert_close("dz", x_TD.grad, expected_TE, torch.float32)


def test_all_experts_get_their_say_in_the_layers_gradient() -> None:
    """Mode "hard_all" in a layer: as if y combined all experts in backward, while the output is that of one."""
    layer = make_layer(E, num_experts=E, router={"name": "gumbel", "mode": "hard_all"})
    x_TD, dy_TD = torch.randn(T, E), torch.randn(T, E)
    torch.manual_seed(3)
    layer(x_TD).backward(dy_TD)
    got = layer.router.weight.grad.clone()

    layer.zero_grad()
    torch.manual_seed(3)
    logits_TE = F.linear(x_TD, layer.router.weight, layer.router.bias)
    y_TE = gumbel_softmax(logits_TE, gumbel_noise(logits_TE), 1.0)
    layer.experts(x_TD, routing_of_matrix(y_TE)).backward(dy_TD)
    assert_close("dweight", got, layer.router.weight.grad, torch.float32)
    assert got.abs().max() > 1e-2


def test_mean_of_the_weights_is_the_mean_of_the_outputs() -> None:
    """GG MoE averages the outputs of 10 draws; one pass with the mean weights is the same."""
    layer = make_layer(E, num_experts=E, router={"name": "gumbel"}).eval()
    x_TD = torch.randn(T, E)
    logits_TE = layer.router(x_TD).logits_TE
    outputs = [
        layer.experts(x_TD, routing_of_matrix(gumbel_softmax(logits_TE, noise_E, 1.0)))
        for noise_E in evaluation_noise(10, E)
    ]
    torch.testing.assert_close(layer(x_TD), torch.stack(outputs).mean(0), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(layer(x_TD), outputs[0], atol=1e-3)


def test_evaluation_noise_favours_nobody_and_estimates_the_mean_well() -> None:
    noise_SE = evaluation_noise(10, 6)
    quantiles = [-math.log(-math.log((s + 0.5) / 10)) for s in range(10)]
    torch.testing.assert_close(noise_SE.sort(0).values, torch.tensor(quantiles)[:, None].expand(10, 6))
    assert len({tuple(column) for column in noise_SE.T.tolist()}) == 6, "experts share an order"
    torch.manual_seed(99)
    assert torch.equal(evaluation_noise(10, 6), noise_SE)
    for temperature, mean in MEANS.items():
        error_E = mean_gumbel_softmax(Z[None], evaluation_noise(100, 3), temperature)[0] - torch.tensor(mean)
        assert error_E.abs().max() < 0.02
    # Better than as many independent draws per token.
    z_TE = torch.randn(300, 8)
    truth_TE = torch.stack([gumbel_softmax(z_TE, gumbel_noise(z_TE), 1.0) for _ in range(1000)]).mean(0)
    chance_TE = torch.stack([gumbel_softmax(z_TE, gumbel_noise(z_TE), 1.0) for _ in range(10)]).mean(0)
    fixed_TE = mean_gumbel_softmax(z_TE, evaluation_noise(10, 8), 1.0)
    assert (fixed_TE - truth_TE).square().mean() < 0.25 * (chance_TE - truth_TE).square().mean()


def test_evaluation_does_not_depend_on_the_batch() -> None:
    router = gumbel_router().eval()
    x_TD = torch.randn(T, E)
    together_TE = router(x_TD).weights_N.view(T, E)
    alone_TE = torch.stack([router(x_D[None]).weights_N for x_D in x_TD])
    torch.testing.assert_close(alone_TE, together_TE)
    torch.testing.assert_close(together_TE.sum(-1), torch.ones(T))


def test_evaluation_without_noise() -> None:
    x_TD = torch.randn(T, E)
    soft = gumbel_router(eval_samples=0, **at_temperature(0.5)).eval()(x_TD)
    torch.testing.assert_close(soft.weights_N.view(T, E), (x_TD / 0.5).softmax(-1))
    for mode in ("hard", "hard_all"):
        router = gumbel_router(mode=mode).eval()
        hard = router(x_TD)
        assert hard.expert_ids_N.tolist() == x_TD.argmax(-1).tolist()
        assert (hard.weights_N == 1).all()
        assert hard.top_k == router.mean_experts_per_token == 1
        near_TD = 1e-3 * x_TD  # any noise would decide
        assert router(near_TD).expert_ids_N.tolist() == x_TD.argmax(-1).tolist()


def test_entries_that_underflow_cost_nothing() -> None:
    """At a low temperature some entries of y are exactly zero: they are not listed, and no gradient is lost."""
    for mode in ("soft", "hard_all"):
        router = gumbel_router(mode=mode, **at_temperature(0.01))
        x_TD, upstream_TE = torch.randn(T, E, requires_grad=True), torch.randn(T, E)
        torch.manual_seed(5)
        routing = router(x_TD)
        assert T < len(routing.weights_N) < T * E
        (routing.weights_N * upstream_TE[routing.token_ids_N, routing.expert_ids_N]).sum().backward()
        dense_TD = x_TD.detach().requires_grad_()
        (drawn(dense_TD, 0.01, 5) * upstream_TE).sum().backward()
        torch.testing.assert_close(x_TD.grad, dense_TD.grad, atol=1e-4, rtol=1e-3)


def test_temperature_falls_with_the_optimizer_steps() -> None:
    options = {"temperature_start": 4.0, "temperature_end": 0.25, "temperature_steps": 4}
    router = gumbel_router(**options)
    x_TD = torch.randn(T, E)
    load = StepLoad(counts_E=torch.zeros(E, dtype=torch.int64), model_density=None, reduce=lambda tensor: tensor)
    for temperature in (4.0, 2.0, 1.0, 0.5, 0.25, 0.25):
        torch.manual_seed(2)
        weights_TE = router(x_TD).weights_N.view(T, E)
        torch.testing.assert_close(weights_TE.double(), drawn(x_TD, temperature, 2), atol=1e-5, rtol=1e-4)
        router.after_step(load)


def test_bias_starts_at_zero_and_learns() -> None:
    for mode in ("soft", "hard", "hard_all"):
        router = gumbel_router(logits=False, mode=mode)
        assert (router.bias == 0).all()
        router(torch.randn(T, E)).weights_N.square().sum().backward()
        assert router.bias.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "straight"}, r"router.mode='straight' is unknown; use one of \('soft', 'hard', 'hard_all'\)"),
        ({"eval_samples": -1}, r"router.eval_samples=-1 must not be negative; 0 evaluates without noise"),
        ({"temperature_end": 0.0}, r"router.temperature_end=0.0 must be positive"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gumbel_router(**options)


@pytest.mark.parametrize("mode", ["soft", "hard", "hard_all"])
def test_it_trains(mode: str) -> None:
    check_training({"name": "gumbel", "mode": mode})
    one_model_step({"name": "gumbel", "mode": mode})
