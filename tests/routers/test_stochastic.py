"""Independent Bernoulli gates (arXiv 1308.3432): frequencies, straight-through gradients by enumeration, the rate loss."""

import itertools
import math

import pytest
import torch
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor

from moe.routers.stochastic import gate_weights, rate_loss
from moe.types import TokenInfo

E, D = 4, 3
LOGITS_E = torch.tensor([0.4, -1.1, 0.0, 1.3], dtype=torch.float64)
EXPERTS_ED = torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COEFS_D = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def linear(y_D: Tensor) -> Tensor:
    return y_D @ COEFS_D


def quadratic(y_D: Tensor) -> Tensor:
    return linear(y_D) + y_D.square().sum()


def outcomes() -> list[tuple[Tensor, Tensor]]:
    """Every pattern of open gates, with its probability as a function of the logits left to the caller."""
    patterns = [torch.tensor(pattern) for pattern in itertools.product([False, True], repeat=E)]
    probs_E = LOGITS_E.sigmoid()
    return [(open_E, torch.where(open_E, probs_E, 1 - probs_E).prod()) for open_E in patterns]


def estimated(loss, kind: str, chosen_only: bool) -> Tensor:
    """Expectation of the straight-through gradient over all 2^E patterns."""
    total_E = torch.zeros(E, dtype=torch.float64)
    for open_E, chance in outcomes():
        leaf_E = LOGITS_E.clone().requires_grad_()
        weights_E = gate_weights(leaf_E, open_E, kind)
        listed_E = open_E if chosen_only else torch.ones_like(open_E)
        loss(weights_E[listed_E] @ EXPERTS_ED[listed_E]).backward()
        total_E += chance * leaf_E.grad
    return total_E


def exact(loss) -> Tensor:
    """Gradient of the expected loss."""
    leaf_E = LOGITS_E.clone().requires_grad_()
    probs_E = leaf_E.sigmoid()
    sum(
        torch.where(open_E, probs_E, 1 - probs_E).prod() * loss(open_E.double() @ EXPERTS_ED)
        for open_E, _ in outcomes()
    ).backward()
    return leaf_E.grad


def test_all_gates_with_the_slope_are_exact_for_linear_losses() -> None:
    torch.testing.assert_close(estimated(linear, "sigmoid", False), exact(linear), rtol=1e-12, atol=1e-14)
    slope_E = LOGITS_E.sigmoid() * (1 - LOGITS_E.sigmoid())
    torch.testing.assert_close(estimated(linear, "identity", False) * slope_E, exact(linear), rtol=1e-12, atol=1e-14)


def test_what_is_biased() -> None:
    for got, loss in (
        (estimated(quadratic, "sigmoid", False), quadratic),
        (estimated(linear, "identity", False), linear),
        (estimated(linear, "sigmoid", True), linear),
    ):
        assert (got - exact(loss)).norm() > 0.2 * exact(loss).norm()


def test_chosen_gates_alone_learn_in_proportion_to_their_chance() -> None:
    got, expected = estimated(linear, "sigmoid", True), exact(linear) * LOGITS_E.sigmoid()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["identity", "sigmoid"])
@pytest.mark.parametrize("backward", ["chosen", "all"])
def test_gates_and_their_gradient_in_the_router(kind: str, backward: str) -> None:
    router = make_router(E, E, logits=True, name="stochastic", straight_through=kind, backward=backward)
    num_tokens = 20_000
    torch.manual_seed(1)
    x_TD = LOGITS_E.float().repeat(num_tokens, 1).requires_grad_()
    routing = router(x_TD)
    chances_E = LOGITS_E.sigmoid()  # target_k = 2 of 4: the bias is 0
    open_TE = torch.zeros(num_tokens, E)
    open_TE[routing.token_ids_N, routing.expert_ids_N] = routing.weights_N.detach()
    assert set(open_TE.unique().tolist()) == {0.0, 1.0}
    sigma_E = (chances_E * (1 - chances_E) / num_tokens).sqrt()
    assert ((open_TE.mean(0) - chances_E).abs() < 5 * sigma_E).all()
    both = (open_TE[:, 0] * open_TE[:, 3]).mean()
    assert abs(both - chances_E[0] * chances_E[3]) < 5 * 0.5 / num_tokens**0.5, "gates are not independent"
    num_listed = num_tokens * E if backward == "all" else int(open_TE.sum())
    assert routing.weights_N.numel() == num_listed

    routing.weights_N.sum().backward()
    slope_E = torch.ones(E) if kind == "identity" else (chances_E * (1 - chances_E)).float()
    expected_TE = slope_E * (open_TE if backward == "chosen" else torch.ones_like(open_TE))
    torch.testing.assert_close(x_TD.grad, expected_TE)


@pytest.mark.parametrize("target_k", [0.5, 2.0, 3.0])
def test_bias_starts_at_the_target(target_k: float) -> None:
    router = make_router(16, 8, name="stochastic", target_k=target_k)
    torch.testing.assert_close(router.bias.sigmoid(), torch.full((8,), target_k / 8))
    torch.manual_seed(0)
    routing = router(torch.zeros(20_000, 16))
    sigma = (target_k * (1 - target_k / 8) / 20_000) ** 0.5
    assert abs(routing.weights_N.numel() / 20_000 - target_k) < 5 * sigma
    assert router.mean_experts_per_token == target_k
    assert make_router(16, 8, name="stochastic", backward="all").mean_experts_per_token == 8
    torch.nn.init.ones_(router.bias)
    router.reset_parameters(0.02)
    torch.testing.assert_close(router.bias.sigmoid(), torch.full((8,), target_k / 8))


def test_rate_loss_is_the_divergence() -> None:
    logits_TE, rate = 2 * torch.randn(50, E, dtype=torch.float64), 0.3
    expected = sum(
        rate * math.log(rate / mean) + (1 - rate) * math.log((1 - rate) / (1 - mean))
        for mean in logits_TE.sigmoid().mean(0).tolist()
    )
    assert rate_loss(logits_TE, rate).item() == pytest.approx(expected, rel=1e-10)
    at_target = torch.full((7, E), math.log(0.3 / 0.7))
    assert rate_loss(at_target, rate).item() == pytest.approx(0.0, abs=1e-6)
    mixed = torch.tensor([[100.0], [-100.0], [-100.0], [-100.0]]).repeat(1, E)  # certain, and open for a quarter
    assert rate_loss(mixed, 0.25).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("logit", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_gradient_of_the_rate_loss_does_not_vanish(logit: float) -> None:
    """sum over tokens of d/da = mean - rate, however shut or open the gates are."""
    logits_TE = torch.full((10, E), logit, requires_grad=True)
    value = rate_loss(logits_TE, 0.25)
    value.backward()
    assert value.isfinite()
    expected_E = torch.full((E,), torch.tensor(logit).sigmoid().item() - 0.25)
    torch.testing.assert_close(logits_TE.grad.sum(0), expected_E, rtol=1e-3, atol=1e-6)  # 1e4 in fp32 is good to 1e-3


def test_padding_counts_in_no_rate_loss() -> None:
    router = make_router(E, E, logits=True, name="stochastic")
    x_TD, keep_T = torch.randn(40, E, requires_grad=True), torch.rand(40) < 0.5
    loss = router(x_TD, TokenInfo(keep_T=keep_T)).aux_losses["rate"]
    short = router(x_TD.detach()[keep_T]).aux_losses["rate"]
    torch.testing.assert_close(loss.value, short.value)
    loss.value.backward()
    assert (x_TD.grad[~keep_T] == 0).all()
    assert (x_TD.grad[keep_T] != 0).all()
    leaf_TE = torch.randn(5, E, requires_grad=True)
    none = rate_loss(leaf_TE, 0.5, torch.zeros(5, dtype=torch.bool))
    none.backward()
    assert none.item() == 0
    assert (leaf_TE.grad == 0).all()
    assert rate_loss(torch.zeros(0, E), 0.5).item() == 0


def test_rate_loss_alone_finds_the_target() -> None:
    logits_E = torch.tensor([-8.0, -2.0, 0.0, 6.0], requires_grad=True)
    optimizer = torch.optim.SGD([logits_E], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        rate_loss(logits_E[None], 0.4).backward()
        optimizer.step()
    torch.testing.assert_close(logits_E.sigmoid(), torch.full((E,), 0.4), atol=1e-3, rtol=0)


def test_expected_evaluation_is_the_mean_of_training() -> None:
    layer = make_layer(6, router={"name": "stochastic", "target_k": 1.5}).eval()
    x_TD = torch.randn(1, 6)
    expected = layer(x_TD)
    num_draws = 20_000
    torch.manual_seed(3)
    drawn_TD = layer.train()(x_TD.expand(num_draws, -1))
    error_D = (drawn_TD.mean(0) - expected[0]).abs()
    assert (error_D < 5 * drawn_TD.std(0) / num_draws**0.5).all()


def test_threshold_evaluation_opens_likely_gates_and_leaves_other_tokens_alone() -> None:
    router = make_router(E, E, logits=True, name="stochastic", evaluation="threshold").eval()
    x_TD = torch.randn(50, E)
    routing = router(x_TD)
    open_TE = torch.zeros(50, E)
    open_TE[routing.token_ids_N, routing.expert_ids_N] = routing.weights_N
    assert torch.equal(open_TE, (x_TD.sigmoid() > 0.5).float())
    layer = make_layer(6, router={"name": "stochastic", "evaluation": "threshold", "target_k": 0.1}).eval()
    layer.router.reset_parameters(0.0)  # every gate at .025
    assert (layer(torch.randn(7, 6)) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 0.0}, r"router.target_k=0.0 must be positive"),
        ({"target_k": 4.0}, r"router.target_k=4.0 must be below num_experts=4"),
        ({"straight_through": "tanh"}, r"router.straight_through='tanh' is unknown; use 'identity' or 'sigmoid'"),
        ({"backward": "none"}, r"router.backward='none' is unknown; use 'chosen' or 'all'"),
        ({"evaluation": "mean"}, r"router.evaluation='mean' is unknown; use 'expected' or 'threshold'"),
        ({"rate_coef": -1.0}, r"router.rate_coef=-1.0 must not be negative"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, E, name="stochastic", **options)
