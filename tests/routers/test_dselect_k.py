"""DSelect-k (arXiv 2106.03760): smooth step, binary codes, sparsity once saturated, and both regularisers."""

import itertools
import math

import pytest
import torch
from helpers.close import assert_close
from helpers.fitting import check_training, fit_layer, one_model_step
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor

from moe.routers.base import StepLoad
from moe.routers.dselect_k import (
    LEAST_REACHABLE,
    DSelectKRouter,
    code_chances,
    selector_entropy,
    smooth_step,
    unreachable_penalty,
)
from moe.types import Routing, TokenInfo

T, D = 12, 6


def gate(num_experts: int, **options: object) -> DSelectKRouter:
    router = make_router(D, num_experts, name="dselect_k", **options)
    assert isinstance(router, DSelectKRouter)
    return router


def set_codes(router: DSelectKRouter, experts: list[int], value: float = 1.0) -> None:
    """The same codes for every token: selector s names expert ``experts[s]``, each bit being +-value."""
    bits = [[value if e >> (router.num_bits - 1 - j) & 1 else -value for j in range(router.num_bits)] for e in experts]
    with torch.no_grad():
        if router.weight is not None:
            router.weight.zero_()
        router.bias.copy_(torch.tensor(bits).view(-1))


def dense(routing: Routing) -> Tensor:
    """(T, E) weights of a routing."""
    weights_TE = torch.zeros(routing.num_tokens, routing.num_experts)
    return weights_TE.index_put((routing.token_ids_N, routing.expert_ids_N), routing.weights_N)


def step_oracle(t: Tensor, gamma: float) -> Tensor:
    if t <= -gamma / 2:
        return t * 0
    if t >= gamma / 2:
        return t * 0 + 1
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5


def weights_oracle(x_D: Tensor, p: dict[str, Tensor], num_experts: int, top_k: int, gamma: float) -> Tensor:
    """(E,) float64 weights of one token, by the formulas of the paper."""
    num_bits = math.ceil(math.log2(num_experts))
    codes = (p["weight"] @ x_D + p["bias"]).view(top_k, num_bits)
    mix_K = (p["mix_weight"] @ x_D + p["mix_bias"]).exp()
    total = [x_D.sum() * 0] * num_experts
    for s in range(top_k):
        for e in range(num_experts):
            q = mix_K[s] / mix_K.sum()
            for j, bit in enumerate(format(e, f"0{num_bits}b")):
                step = step_oracle(codes[s, j], gamma)
                q = q * (step if bit == "1" else 1 - step)
            total[e] = total[e] + q
    return torch.stack(total)


def test_smooth_step_values() -> None:
    """S and S' for gamma = 1, as the paper's formulas give them."""
    t = torch.tensor([-2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    value = smooth_step(t, 1.0)
    assert value.tolist() == pytest.approx([0, 0, 0.15625, 0.5, 0.84375, 1, 1])
    value.sum().backward()
    assert t.grad.tolist() == pytest.approx([0, 0, 1.125, 1.5, 1.125, 0, 0])
    for gamma in (0.2, 3.0):
        got, wanted = smooth_step(t * gamma * 0.9, gamma), [step_oracle(v * gamma * 0.9, gamma).item() for v in t]
        assert got.tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.0, 3.7])
def test_smooth_step_is_continuous_at_the_knots_and_exact_beyond(gamma: float) -> None:
    for sign in (-1, 1):
        knot = torch.tensor(sign * gamma / 2, dtype=torch.float64)
        near = knot + gamma * torch.tensor([-1e-6, 0.0, 1e-6], dtype=torch.float64)
        near.requires_grad_()
        value = smooth_step(near, gamma)
        assert (value - int(sign > 0)).abs().max() < 1e-11, "S is continuous"
        value.sum().backward()
        assert near.grad.abs().max() * gamma < 1e-5, "and so is S'"
    grid = torch.linspace(-0.51 * gamma, 0.51 * gamma, 100_001)  # fp32: exact zeros and ones, and nothing outside
    value = smooth_step(grid, gamma)
    assert value.min() == 0
    assert value.max() == 1
    assert (value[grid <= -0.5001 * gamma] == 0).all()
    assert (value[grid >= 0.5001 * gamma] == 1).all()


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_codes_by_enumeration(num_bits: int) -> None:
    """Expert i is the binary number i, most significant bit first; the weights of all codes sum to one."""
    codes_RKm = torch.randn(5, 2, num_bits, dtype=torch.float64) * 0.3
    chances_RKC = code_chances(codes_RKm, 1.0)
    on_RKm = smooth_step(codes_RKm, 1.0)
    for code, bits in enumerate(itertools.product((0, 1), repeat=num_bits)):
        expected_RK = torch.ones(5, 2, dtype=torch.float64)
        for j, bit in enumerate(bits):
            expected_RK = expected_RK * (on_RKm[..., j] if bit else 1 - on_RKm[..., j])
        torch.testing.assert_close(chances_RKC[..., code], expected_RK)
    torch.testing.assert_close(chances_RKC.sum(-1), torch.ones(5, 2, dtype=torch.float64))


def test_gradients_of_the_pure_functions() -> None:
    codes_RKm = ((torch.rand(3, 2, 3, dtype=torch.float64) - 0.5) * 0.9).requires_grad_()  # inside (-gamma/2, gamma/2)
    assert torch.autograd.gradcheck(lambda codes: code_chances(codes, 1.0), codes_RKm)
    assert torch.autograd.gradcheck(lambda codes: selector_entropy(code_chances(codes, 1.0)[..., :5]), codes_RKm)
    assert torch.autograd.gradcheck(
        lambda codes: unreachable_penalty(code_chances(codes, 1.0)[..., :5].sum(-1)), codes_RKm
    )


@pytest.mark.parametrize(
    ("num_experts", "gamma", "scale"), [(8, 1.0, 0.1), (8, 1.0, 0.6), (5, 0.5, 0.3), (2, 2.0, 0.5)]
)
def test_router_against_the_loop(num_experts: int, gamma: float, scale: float) -> None:
    """Weights, and every gradient; experts that are not listed would have got none."""
    router = gate(num_experts, top_k=2, gamma=gamma)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=scale)
    x_TD, upstream_TE = torch.randn(T, D, requires_grad=True), torch.randn(T, num_experts)
    weights_TE = dense(router(x_TD))
    (weights_TE * upstream_TE).sum().backward()

    p = {name: value.detach().double().requires_grad_() for name, value in router.named_parameters()}
    x64_TD = x_TD.detach().double().requires_grad_()
    expected_TE = torch.stack([weights_oracle(x_D, p, num_experts, 2, gamma) for x_D in x64_TD])
    (expected_TE * upstream_TE).sum().backward()
    assert_close("weights", weights_TE, expected_TE, torch.float32)
    assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)
    for name, parameter in router.named_parameters():
        assert_close(name, parameter.grad, p[name].grad, torch.float32)
    if num_experts in (2, 8):
        torch.testing.assert_close(weights_TE.sum(-1), torch.ones(T))
    if scale == 0.6:
        assert 0 < len(router(x_TD).weights_N) < T * num_experts, "some bits are saturated"


@pytest.mark.parametrize("num_experts", [2, 4, 5, 8])
def test_saturated_selectors_are_one_hot_at_their_code(num_experts: int) -> None:
    for expert in range(num_experts):
        router = gate(num_experts, top_k=1)
        set_codes(router, [expert])
        routing = router(torch.randn(T, D))
        assert routing.expert_ids_N.tolist() == [expert] * T
        assert (routing.weights_N == 1).all()


def test_saturated_selectors_mix_by_their_softmax_and_add_up() -> None:
    router, x_TD = gate(8, top_k=3), torch.randn(T, D)
    with torch.no_grad():
        router.mix_bias.copy_(torch.tensor([0.1, 0.2, 0.3]).log())
        router.mix_weight.zero_()
    for experts, expected in (([6, 1, 3], {6: 1 / 6, 1: 2 / 6, 3: 3 / 6}), ([6, 1, 6], {6: 4 / 6, 1: 2 / 6})):
        set_codes(router, experts)
        routing = router(x_TD)
        assert len(routing.weights_N) == T * len(expected), "at most K, fewer where selectors agree"
        weights_E = dense(routing)[0]
        assert {e: weights_E[e].item() for e in expected} == pytest.approx(expected)


def test_saturated_bits_are_frozen_and_the_mixture_learns() -> None:
    router = gate(8, top_k=2)
    set_codes(router, [6, 1])
    routing = router(torch.randn(T, D))
    (routing.weights_N * torch.randn(2 * T)).sum().backward()
    assert (router.weight.grad == 0).all()
    assert (router.bias.grad == 0).all()
    assert router.mix_bias.grad.abs().max() > 1e-2
    assert router.mix_weight.grad.abs().max() > 1e-2


@pytest.mark.parametrize(("num_experts", "value"), [(5, 8 / 5), (6, 8 / 6), (7, 8 / 7)])
def test_penalty_on_codes_without_expert(num_experts: int, value: float) -> None:
    """1 / (share of the codes that have an expert) per selector at zero codes, 1 once it is all of them."""
    for top_k in (1, 2):
        router = gate(num_experts, top_k=top_k)
        x_TD = torch.randn(T, D)
        assert router(x_TD).aux_losses["unreachable"].value.item() == pytest.approx(top_k * value, rel=0.05), "at init"
        set_codes(router, [0] * top_k, 0.0)
        loss = router(x_TD).aux_losses["unreachable"]
        assert (loss.value.item(), loss.coef) == (pytest.approx(top_k * value), 1.0)
        assert dense(router(x_TD)).sum(-1).tolist() == pytest.approx([1 / value] * T), "not renormalised"
        set_codes(router, [num_experts - 1] * top_k)
        assert router(x_TD).aux_losses["unreachable"].value.item() == pytest.approx(top_k)
    for power_of_two in (2, 4, 8):
        assert "unreachable" not in gate(power_of_two)(x_TD).aux_losses


def test_penalty_stays_finite_and_keeps_its_slope() -> None:
    mass = torch.tensor([0.0, 0.02, LEAST_REACHABLE, 0.11, 1.0], dtype=torch.float64, requires_grad=True)
    value = unreachable_penalty(mass)
    assert value.tolist() == pytest.approx([20, 18, 10, 1 / 0.11, 1])
    value.sum().backward()
    assert mass.grad.tolist() == pytest.approx([-100, -100, -100, -1 / 0.11**2, -1])


def test_a_token_on_codes_without_expert_is_finite_and_reported() -> None:
    layer = make_layer(D, num_experts=5, router={"name": "dselect_k"})
    router = layer.router
    assert isinstance(router, DSelectKRouter)
    set_codes(router, [7, 6])
    x_TD = torch.randn(T, D, requires_grad=True)
    y_TD = layer(x_TD)
    assert (y_TD == 0).all(), "the residual alone"
    y_TD.sum().backward()
    for parameter in router.parameters():
        assert parameter.grad.isfinite().all()
    assert layer.stats.sums["loss/unreachable"].item() == pytest.approx(40)
    assert layer.stats.sums["assigned"] == 0
    torch.testing.assert_close(router(x_TD).probs_TE, torch.full((T, 5), 0.2))
    set_codes(router, [7, 4])  # one selector is lost, the other is not
    routing = router(x_TD)
    assert routing.expert_ids_N.tolist() == [4] * T
    assert (routing.weights_N < 1).all()


@pytest.mark.parametrize("num_experts", [8, 5])
def test_entropy(num_experts: int) -> None:
    """K m ln 2 of all codes at zero codes, of which E / 2^m are counted; 0 once saturated."""
    router = gate(num_experts, top_k=2, entropy_coef=0.3, entropy_warmup_steps=0)
    set_codes(router, [0, 0], 0.0)
    loss = router(torch.randn(T, D)).aux_losses["entropy"]
    assert loss.value.item() == pytest.approx(2 * 3 * math.log(2) * num_experts / 8, rel=1e-4)
    assert float(loss.coef) == pytest.approx(0.3)
    set_codes(router, [3, 4])
    assert abs(router(torch.randn(T, D)).aux_losses["entropy"].value.item()) < 1e-5


def test_regularisers_are_means_over_tokens_without_padding() -> None:
    router, x_TD = gate(5), torch.randn(T, D)
    with torch.no_grad():
        router.weight.normal_(std=0.1)
    keep_T = torch.arange(T) % 3 > 0
    plain, twice = router(x_TD).aux_losses, router(x_TD.repeat(2, 1)).aux_losses
    masked = router(x_TD, TokenInfo(keep_T=keep_T)).aux_losses
    kept = router(x_TD[keep_T]).aux_losses
    for name in ("entropy", "unreachable"):
        torch.testing.assert_close(twice[name].value, plain[name].value)
        torch.testing.assert_close(masked[name].value, kept[name].value)
        assert abs(masked[name].value - plain[name].value) > 1e-4
    assert router.eval()(x_TD).aux_losses == {}


def test_entropy_coefficient_grows_with_the_optimizer_steps() -> None:
    router, x_TD = gate(8, entropy_coef=0.4, entropy_warmup_steps=4), torch.randn(T, D)
    load = StepLoad(counts_E=torch.zeros(8, dtype=torch.int64), model_density=None, reduce=lambda tensor: tensor)
    for expected in (0.0, 0.1, 0.2, 0.3, 0.4, 0.4):
        assert float(router(x_TD).aux_losses["entropy"].coef) == pytest.approx(expected)
        router.after_step(load)
    assert "entropy" not in gate(8, entropy_coef=0.0)(x_TD).aux_losses


def test_static_gate_is_the_same_for_every_token() -> None:
    router = gate(8, gate="static")
    assert {name for name, _ in router.named_parameters()} == {"bias", "mix_bias"}
    routing = router(torch.randn(T, D))
    weights_TE = dense(routing)
    assert (weights_TE == weights_TE[0]).all()
    assert len(routing.weights_N) == T * 8
    (weights_TE * torch.randn(T, 8)).sum().backward()
    assert router.bias.grad.abs().min() > 0
    assert router.mix_bias.grad.abs().min() > 0
    assert not routing.probs_TE.requires_grad, "no balance loss on a gate that is meant to use few experts"
    set_codes(router, [2, 7])
    assert router(torch.randn(T, D)).counts_E.tolist() == [0, 0, T, 0, 0, 0, 0, T]


def test_probabilities_are_the_weights_and_the_rest_is_shared() -> None:
    for num_experts in (8, 5):
        router, x_TD = gate(num_experts), torch.randn(T, D)
        routing = router(x_TD)
        weights_TE = dense(routing)
        rest_T1 = 1 - weights_TE.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.probs_TE, weights_TE + rest_T1 / num_experts, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(T))
        assert routing.probs_TE.requires_grad


def test_initial_ranges() -> None:
    for dim, bound in ((64, 0.02), (4096, 0.005)):  # gamma / 100 up to a width of 256, then as 1 / sqrt(D)
        router = make_router(dim, 256, name="dselect_k", gamma=2.0)
        assert 0.95 * bound < router.weight.abs().max() <= bound
        assert 0.8 * 0.02 < router.bias.abs().max() <= 0.02
        assert 0.95 * bound * 2.5 < router.mix_weight.abs().max() <= bound * 2.5
        assert router.mix_bias.abs().max() <= 0.05
    normed_TD = torch.nn.functional.rms_norm(torch.randn(200, 4096), [4096])
    assert router(normed_TD).counts_E.min() == 200, "a bit is saturated at the start"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"router.top_k=0 must be at least 1"),
        ({"top_k": 9}, r"router.top_k=9 is more than num_experts=8; lower it or add experts"),
        ({"gate": "task"}, r"router.gate='task' is unknown; use 'per_example' or 'static'"),
        ({"gamma": 0.0}, r"router.gamma=0.0 must be positive"),
        ({"entropy_coef": -0.1}, r"router.entropy_coef=-0.1 must not be negative"),
        ({"entropy_warmup_steps": -1}, r"router.entropy_warmup_steps=-1 must not be negative"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(8, **options)
    with pytest.raises(ValueError, match=r"num_experts=1 leaves router dselect_k nothing to choose"):
        gate(1)


@pytest.mark.parametrize("options", [{}, {"gate": "static"}], ids=str)
def test_it_trains(options: dict) -> None:
    check_training({"name": "dselect_k", "gamma": 0.5, **options})
    one_model_step({"name": "dselect_k", **options}, num_experts=5)


def test_entropy_drives_it_to_k_experts() -> None:
    densities = {}
    for coef in (0.0, 1.0):
        router = {"name": "dselect_k", "entropy_coef": coef, "entropy_warmup_steps": 50}
        densities[coef] = fit_layer(100, num_experts=8, router=router).densities
        assert densities[coef][0] == 1
    assert densities[1.0][-1] * 8 < 2.5
    assert densities[0.0][-1] * 8 > 3.5
