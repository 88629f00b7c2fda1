"""`ops.route_topk`: the fused kernels against float64 autograd of the reference, and the reference against what is known."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.layer_oracle import gradients, make_layer, same_weights
from helpers.routing import make_router
from helpers.triton_blocks import small_blocks
from torch import Tensor

from moe.kernels import grouped, ops, reference, triton_router, triton_router_ops
from moe.layer import MoELayer
from moe.observe import RoutingContext
from moe.routers.balance import BalanceConfig
from moe.routers.topk import TopKRouter
from moe.types import TopKChoices, TopKRule

Route = Callable[..., TopKChoices]

RULES = {
    "before": TopKRule(),
    "not renormalised": TopKRule(renormalize=False, route_scale=2.5),
    "after": TopKRule(softmax_order="after", route_scale=0.5),
    "sigmoid": TopKRule(score="sigmoid", route_scale=2.5),
    "sigmoid not renormalised": TopKRule(score="sigmoid", renormalize=False),
}
SHAPES = [(1, 3, 1), (3, 8, 8), (70, 8, 2), (13, 60, 3), (5, 130, 4), (3, 257, 8), (4, 1, 1)]
FLOATS = ("prob_sum_E", "z_sum", "entropy_sum", "logit_norm_sum")


@pytest.fixture(autouse=True)
def several_tiles_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_router, "MOST_PROGRAMS", 2)


def outputs(choices: TopKChoices) -> dict[str, Tensor]:
    """What has a gradient."""
    return {"weights": choices.weights_TK, "probs": choices.stats.prob_sum_E, "z": choices.stats.z_sum}


def run(
    route: Route, logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None = None, keep_T: Tensor | None = None
) -> tuple[TopKChoices, dict[str, Tensor]]:
    """Choices, and the logits' gradient of each output by itself and of all of them."""
    generator = torch.Generator().manual_seed(3)
    leaf_TE = logits_TE.detach().clone().requires_grad_()
    choices = route(leaf_TE, rule, bias_E, keep_T)
    found = outputs(choices)
    upstream = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in found.items()}
    grads = {
        f"d{name}": torch.autograd.grad(value, leaf_TE, upstream[name], retain_graph=True)[0]
        for name, value in found.items()
    }
    grads["dall"] = torch.autograd.grad(list(found.values()), leaf_TE, list(upstream.values()))[0]
    return choices, grads


def assert_same(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """As `assert_close`; what is zero but for float64's rounding must be so for that of float32."""
    if expected.numel() and expected.abs().max() < 1e-12:
        assert got.abs().max() < 1e-6, name
    else:
        assert_close(name, got, expected, dtype)


def check(
    logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None = None, keep_T: Tensor | None = None
) -> tuple[TopKChoices, dict[str, Tensor]]:
    """The kernels give the choices, sums and gradients of the reference in float64; returns theirs."""
    bias64_E = None if bias_E is None else bias_E.double()
    choices, grads = run(triton_router_ops.route_topk, logits_TE, rule, bias_E, keep_T)
    expected, expected_grads = run(reference.route_topk, logits_TE.double(), rule, bias64_E, keep_T)
    assert choices.weights_TK.dtype == choices.stats.prob_sum_E.dtype == choices.stats.z_sum.dtype == torch.float32
    assert torch.equal(choices.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(choices.counts_E, expected.counts_E)
    assert torch.equal(choices.stats.counts_E, expected.stats.counts_E)
    assert torch.equal(choices.stats.num_kept, expected.stats.num_kept)
    assert_same("weights", choices.weights_TK, expected.weights_TK)
    for name in FLOATS:
        value = getattr(expected.stats, name)
        if value.isfinite().all():
            assert_same(name, getattr(choices.stats, name), value)
    for name, value in expected_grads.items():
        assert grads[name].dtype == logits_TE.dtype
        assert_same(name, grads[name], value, logits_TE.dtype)
    return choices, grads


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_outputs_and_gradients(num_tokens: int, num_experts: int, top_k: int, rule: str) -> None:
    logits_TE = 2 * torch.randn(num_tokens, num_experts)
    check(logits_TE, dataclasses.replace(RULES[rule], top_k=top_k))


def test_more_programs_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_router, "TILE", 1)
    monkeypatch.setattr(triton_router, "MOST_PROGRAMS", 1000)
    assert triton_router.blocks(3, 1, 2)["ROWS"] == 1
    logits_TE, keep_T = torch.randn(70, 3), torch.rand(70) < 0.5
    got = triton_router_ops.route_topk(logits_TE, TopKRule(), None, keep_T)
    expected = reference.route_topk(logits_TE.double(), TopKRule(), None, keep_T)
    assert torch.equal(got.counts_E, expected.counts_E)
    assert torch.equal(got.stats.counts_E, expected.stats.counts_E)
    for name in FLOATS:
        assert_close(name, getattr(got.stats, name), getattr(expected.stats, name), torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_bias_and_mask(rule: str) -> None:
    logits_TE, bias_E, keep_T = 2 * torch.randn(37, 13), 0.3 * torch.randn(13), torch.rand(37) < 0.6
    given = dataclasses.replace(RULES[rule], top_k=3)
    biased, _ = check(logits_TE, given, bias_E, keep_T)
    free, _ = check(logits_TE, given, None, keep_T)
    assert not torch.equal(biased.expert_ids_TK, free.expert_ids_TK)
    assert not torch.equal(biased.counts_E, biased.stats.counts_E)
    nothing, grads = check(logits_TE, given, bias_E, torch.zeros(37, dtype=torch.bool))
    assert nothing.stats.num_kept == 0
    assert grads["dprobs"].abs().max() == 0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_experts", "num_groups", "kept", "top_k"), [(20, 4, 2, 4), (9, 3, 2, 5), (5, 5, 3, 2)])
def test_groups(num_experts: int, num_groups: int, kept: int, top_k: int, biased: bool) -> None:
    logits_TE, bias_E = torch.randn(17, num_experts), torch.randn(num_experts) if biased else None
    rule = TopKRule(top_k=top_k, score="sigmoid", num_groups=num_groups, top_k_groups=kept)
    choices, _ = check(logits_TE, rule, bias_E)
    scores_TE = logits_TE.sigmoid() + (0 if bias_E is None else bias_E)
    num_best = 2 if biased else 1
    expected = [oracles.group_limited_choice(row, num_groups, kept, top_k, num_best) for row in scores_TE.tolist()]
    assert choices.expert_ids_TK.tolist() == expected
    if num_experts > num_groups:
        free = reference.route_topk(logits_TE, TopKRule(top_k=top_k, score="sigmoid"), bias_E)
        assert free.expert_ids_TK.tolist() != expected, "the groups did not limit anything"


@pytest.mark.parametrize("route", [triton_router_ops.route_topk, reference.route_topk], ids=["triton", "reference"])
def test_of_equal_experts_the_first_is_chosen(route: Route) -> None:
    logits_TE = torch.randint(3, (40, 11)).float()
    expected = [sorted(range(11), key=lambda e: (-row[e], e))[:4] for row in logits_TE.tolist()]
    bias_E = torch.zeros(11)
    for rule in (TopKRule(top_k=4), TopKRule(top_k=4, score="sigmoid")):
        for bias in (None, bias_E):
            assert route(logits_TE, rule, bias).expert_ids_TK.tolist() == expected
    same_TE = torch.zeros(3, 12)
    for bias in (None, torch.zeros(12)):
        limited = TopKRule(top_k=5, num_groups=4, top_k_groups=2)
        assert route(same_TE, limited, bias).expert_ids_TK.tolist() == [[0, 1, 2, 3, 4]] * 3
    # Two equal experts make a group's value, each of them once.
    bias_E = torch.tensor([1.0, 1, 0, 1.5, 0, 0, 0, 0, 0])
    limited = TopKRule(top_k=2, num_groups=3)
    assert route(torch.zeros(1, 9), limited, bias_E).expert_ids_TK.tolist() == [[0, 1]]
    # Equal experts of the best group come before better ones of the others.
    grouped_TE = torch.tensor([[0.0, 9, 5, 5, 1, 1, 1, 1, 8, 0, 0, 0]])
    limited = TopKRule(top_k=4, num_groups=3)
    assert route(grouped_TE, limited).expert_ids_TK.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_extreme_logits(rule: str) -> None:
    logits_TE = torch.randn(6, 7)
    logits_TE[0, 2], logits_TE[1, 3], logits_TE[2], logits_TE[3] = 1e4, -1e4, 1e4, -1e4
    logits_TE[4, 1:6] = float("-inf")
    for bias_E in (None, torch.randn(7)):
        choices, grads = check(logits_TE, dataclasses.replace(RULES[rule], top_k=3), bias_E)
        assert choices.expert_ids_TK.sort().values.diff().min() > 0, "an expert twice"
        assert all(value.isfinite().all() for value in grads.values())


def test_an_expert_without_probability_comes_before_those_of_dropped_groups() -> None:
    logits_TE = torch.tensor([[1.0, float("-inf"), float("-inf"), 0.5, 0.5, 0.5]])
    check(logits_TE, TopKRule(num_groups=2, top_k_groups=1, renormalize=False))
    choices = triton_router_ops.route_topk(logits_TE, TopKRule(num_groups=2, top_k_groups=1))
    assert choices.expert_ids_TK.tolist() == [[0, 1]]


def test_nan_gives_valid_ids_and_stays_with_its_token() -> None:
    logits_TE = torch.randn(4, 6)
    logits_TE[1, 4], logits_TE[2] = float("nan"), float("nan")
    for bias_E in (None, torch.zeros(6)):
        choices = triton_router_ops.route_topk(logits_TE, TopKRule(top_k=3), bias_E)
        ids_TK = choices.expert_ids_TK
        assert ids_TK.min() >= 0
        assert ids_TK.max() < 6
        assert ids_TK.sort().values.diff().min() > 0
        assert choices.weights_TK.isnan().any(-1).tolist() == [False, True, True, False]
    alone = triton_router_ops.route_topk(logits_TE, TopKRule(score="sigmoid", renormalize=False))
    assert alone.expert_ids_TK[1, 0] == 4, "a NaN must not hide"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)  # for the tolerance of the interpreter's rounding
    check(torch.randn(21, 10).to(dtype), TopKRule(top_k=3))


def test_no_tokens() -> None:
    choices, grads = check(torch.zeros(0, 5), TopKRule(), torch.zeros(5), torch.zeros(0, dtype=torch.bool))
    assert choices.expert_ids_TK.shape == (0, 2)
    assert grads["dall"].shape == (0, 5)


def test_strided_inputs() -> None:
    wide_TE, keep_T = torch.randn(9, 10), torch.rand(18) < 0.5
    expected, _ = check(wide_TE[:, ::2].contiguous(), TopKRule(), None, keep_T[::2].contiguous())
    got = triton_router_ops.route_topk(wide_TE[:, ::2], TopKRule(), None, keep_T[::2])
    assert torch.equal(got.weights_TK, expected.weights_TK)
    leaf_TE = wide_TE.clone().requires_grad_()
    triton_router_ops.route_topk(leaf_TE[:, ::2], TopKRule()).weights_TK[
        :, 0
    ].sum().backward()  # a gradient with strides
    assert leaf_TE.grad is not None
    assert (leaf_TE.grad[:, 1::2] == 0).all()
    assert leaf_TE.grad.abs().max() > 0


def test_repeats_bit_for_bit() -> None:
    logits_TE, bias_E, keep_T = torch.randn(70, 9), torch.randn(9), torch.rand(70) < 0.5
    first, grads = run(triton_router_ops.route_topk, logits_TE, TopKRule(), bias_E, keep_T)
    again, same_grads = run(triton_router_ops.route_topk, logits_TE, TopKRule(), bias_E, keep_T)
    for name, value in outputs(first).items():
        assert torch.equal(outputs(again)[name], value)
    for name in FLOATS:
        assert torch.equal(getattr(again.stats, name), getattr(first.stats, name))
    for name, value in grads.items():
        assert torch.equal(same_grads[name], value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False, "top_k": 3},
        {"softmax_order": "after", "route_scale": 2.0},
        {"score": "sigmoid", "selection_bias": True, "num_groups": 4, "top_k_groups": 2},
        {"selection_bias": True, "num_groups": 2},
    ],
    ids=str,
)
def test_the_reference_is_the_router_in_plain_torch(options: dict) -> None:
    router = make_router(8, 8, logits=True, **options)
    bias_E = None
    if "selection_bias" in options:
        bias_E = router.get_buffer("bias_E").normal_()
    logits_TE = torch.randn(25, 8, requires_grad=True)
    routing = router(logits_TE)
    choices = reference.route_topk(logits_TE, router.config, bias_E)
    assert torch.equal(choices.expert_ids_TK.reshape(-1), routing.expert_ids_N)
    assert torch.equal(choices.weights_TK.reshape(-1), routing.weights_N)
    assert torch.equal(choices.counts_E, routing.counts_E)
    torch.testing.assert_close(choices.stats.prob_sum_E, routing.probs_TE.sum(0))
    upstream_N = torch.randn_like(routing.weights_N)
    (expected,) = torch.autograd.grad(routing.weights_N, logits_TE, upstream_N)
    (got,) = torch.autograd.grad(choices.weights_TK, logits_TE, upstream_N.view(25, -1))
    assert torch.equal(got, expected)


def test_the_door_picks_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = torch.randn(3, 4)
    for name in ops.NAMES:
        monkeypatch.setitem(ops._ROUTE_TOPK, name, lambda *args, name=name: name)
        monkeypatch.setenv("MOE_KERNELS", name)
        assert ops.route_topk(logits_TE, TopKRule()) == name
    with pytest.raises(ValueError, match=r"MOE_KERNELS='triton' cannot run: dtype torch.float64"):
        ops.route_topk(logits_TE.double(), TopKRule())
    monkeypatch.delenv("MOE_KERNELS")
    assert ops.route_topk(logits_TE, TopKRule()) == "grouped"


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "selection_bias": True, "num_groups": 2}], ids=str)
def test_the_operators_keep_their_promises(options: dict) -> None:
    """Schema, fake implementation, autograd registration, and tracing with gradients."""
    bias_E, keep_T = (torch.randn(8), torch.rand(6) < 0.5) if options else (None, None)
    rule = TopKRule(**{key: value for key, value in options.items() if key != "selection_bias"})
    sigmoid, flags = rule.score == "sigmoid", (False, True, 1.5)
    logits_TE = torch.randn(6, 8, requires_grad=True)
    args = (logits_TE, bias_E, keep_T, 2, sigmoid, *flags, rule.num_groups, rule.top_k_groups)
    torch.library.opcheck(triton_router_ops._forward, args)
    upstream = (torch.randn(6, 2), torch.randn(8), torch.randn(()))
    ids_TK = triton_router_ops.route_topk(logits_TE, rule).expert_ids_TK
    torch.library.opcheck(triton_router_ops._backward, (*upstream, logits_TE.detach(), keep_T, ids_TK, sigmoid, *flags))


BALANCES = {
    "micro_batch": BalanceConfig(aux_coef=0.5, aux_scope="micro_batch"),
    "global_batch and z": BalanceConfig(aux_coef=0.5, aux_scope="global_batch", z_coef=0.3),
    "sequence": BalanceConfig(aux_coef=0.5, aux_scope="sequence", z_coef=0.3),
}


def step(layer: MoELayer, x_BLD: Tensor, dy_BLD: Tensor) -> dict[str, Tensor]:
    """Gradients, counts and statistics of two micro-batches."""
    layer.zero_grad()
    x_BLD = x_BLD.clone().requires_grad_()
    for _ in range(2):
        layer(x_BLD).backward(dy_BLD)
    assert layer.stats.counts_E is not None
    found = gradients(layer, x_BLD) | {"counts": layer.stats.counts_E} | layer.stats.sums
    layer.finish_step()
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "router",
    [
        {"name": "topk"},
        {"name": "topk", "softmax_order": "after", "jitter": 0.0},
        {"name": "switch", "jitter": 0.0},
        {"name": "noaux_tc", "num_groups": 2},
        {"name": "modified_softmax"},
    ],
    ids=lambda router: "-".join(map(str, router.values())),
)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_layer_gets_the_losses_and_statistics_of_plain_torch(
    balance: str, router: dict, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (masked or balance != "global_batch and z") and router not in (
        {"name": "topk"},
        {"name": "noaux_tc", "num_groups": 2},
    ):
        pytest.skip("the same for all of them")
    plain_experts(monkeypatch)
    context = RoutingContext()
    context.token_mask_T = torch.rand(14) < 0.7 if masked else None
    layer = make_layer(6, router=router, balance=BALANCES[balance], context=context)
    x_BLD, dy_BLD = torch.randn(2, 2, 7, 6)
    monkeypatch.setenv("MOE_KERNELS", "reference")
    expected = step(layer, x_BLD, dy_BLD)
    monkeypatch.setenv("MOE_KERNELS", "triton")
    calls = count_calls(monkeypatch)
    got = step(layer, x_BLD, dy_BLD)
    assert len(calls) == (0 if balance == "sequence" else 2)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, got[name], value, torch.float32)


def plain_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer, only the router runs fused: the experts have tests of their own."""
    monkeypatch.setitem(ops._EXPERT_FFN, "triton", grouped.expert_ffn)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each call of the fused kernels."""
    calls: list[None] = []

    def counted(*args: object) -> TopKChoices:
        calls.append(None)
        return triton_router_ops.route_topk(*args)

    monkeypatch.setitem(ops._ROUTE_TOPK, "triton", counted)
    return calls


def test_the_balance_gradient_is_large_enough_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would not notice a missing loss otherwise."""
    plain_experts(monkeypatch)
    monkeypatch.setenv("MOE_KERNELS", "triton")
    layer = make_layer(6, balance=BALANCES["global_batch and z"])
    x_BLD, dy_BLD = torch.randn(2, 2, 7, 6)
    with_losses, without = step(layer, x_BLD, dy_BLD), step(same_weights(layer), x_BLD, dy_BLD)
    assert (with_losses["router.weight"] - without["router.weight"]).abs().max() > 1e-2


def test_a_router_with_steps_of_its_own_or_read_probabilities_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOE_KERNELS", "triton")
    plain_experts(monkeypatch)

    class Doubling(TopKRouter):
        def weigh(self, *tensors: Tensor) -> Tensor:
            return 2 * super().weigh(*tensors)

    calls, x_TD = count_calls(monkeypatch), torch.randn(5, 6)
    plain = make_router(6, 8)
    assert plain(x_TD).probs_TE is not None, "a router used alone gives its probabilities"
    for router in (make_router(6, 8, name="noisy_topk"), Doubling(6, 8, plain.config)):
        make = make_layer(6, num_experts=8)
        make.router = router
        make(x_TD)
    assert not calls
    make_layer(6)(x_TD)
    assert len(calls) == 1


def test_backward_keeps_the_logits_and_nothing_else_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "triton")
    layer = make_layer(6, num_experts=11, balance=BALANCES["global_batch and z"])
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer(torch.randn(13, 6))
    assert sum(tensor.shape == (13, 11) for tensor in saved.values()) == 1


def test_a_graph_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison: a stand-in for the torch module is not traceable
    monkeypatch.setenv("MOE_KERNELS", "triton")
    torch.compiler.reset()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer, x_TD = make_layer(6), torch.randn(5, 6)
    y_TD = torch.compile(layer, fullgraph=True, backend=backend)(x_TD)
    assert_close("y", y_TD, layer(x_TD), torch.float32)
    assert "moe.route_topk.default" in targets or "moe.route_topk" in targets, targets
