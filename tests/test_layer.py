"""The MoE layer: output and all gradients against the double loop, soft routings, capacity, precision."""

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.layer_oracle import assert_same_gradients, gradients, make_layer, oracle_gradients
from torch import Tensor, nn

from moe.layer import MoELayer, MoESpec, moe_layers
from moe.routers import ROUTERS, Router, RouterConfig
from moe.routers.capacity import apply_capacity
from moe.types import NO_INFO, Routing, SoftRouting, TokenInfo

T, D, E = 19, 6, 4


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "shared",
    [{}, {"num_shared_experts": 2}, {"num_shared_experts": 1, "shared_gate": True}],
    ids=["routed", "shared", "gated"],
)
@pytest.mark.parametrize("router", [{"top_k": 2}, {"top_k": 3, "renormalize": False}], ids=str)
def test_output_and_gradients(router: dict, shared: dict, activation: str) -> None:
    layer = make_layer(D, router=router, activation=activation, **shared)
    x_TD, dy_TD = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    y_TD = layer(x_TD)
    y_TD.backward(dy_TD)
    expected_TD, expected = oracle_gradients(layer, x_TD, dy_TD)
    assert_close("y", y_TD, expected_TD, torch.float32)
    assert_same_gradients(gradients(layer, x_TD), expected)
    assert len(expected) == 1 + len(list(layer.parameters())), "a parameter has no gradient"


@pytest.mark.parametrize("shape", [(D,), (1, D), (2, 3, D), (2, 1, 3, D), (0, D), (2, 0, D)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = make_layer(D, num_shared_experts=1)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert_close("y", y.view(-1, D), layer(x.reshape(-1, D)), torch.float32)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_transposed_input() -> None:
    layer = make_layer(D)
    x_DT = torch.randn(D, T)
    assert_close("y", layer(x_DT.T), layer(x_DT.T.contiguous()), torch.float32)


def test_the_residual_may_be_added_in_place() -> None:
    layer = make_layer(D, balance=MoESpec().balance)
    x_TD = torch.randn(T, D, requires_grad=True)
    expected_TD = layer(x_TD) + x_TD
    y_TD = layer(x_TD)
    y_TD += x_TD
    y_TD.sum().backward()
    assert_close("y", y_TD, expected_TD, torch.float32)
    got = gradients(layer, x_TD)
    layer.zero_grad()
    x_TD.grad = None
    layer.finish_step()
    (layer(x_TD) + x_TD).sum().backward()
    assert_same_gradients(got, gradients(layer, x_TD))


def test_an_exchange_takes_the_place_of_the_local_experts() -> None:
    layer = make_layer(D)
    seen: list[Routing] = []

    def exchange(x_TD: Tensor, routing: Routing, experts: nn.Module, meanwhile: object) -> Tensor:
        seen.append(routing)
        return 2 * experts(x_TD, routing)

    x_TD = torch.randn(T, D)
    expected_TD = 2 * layer(x_TD)
    layer.exchange = exchange
    assert_close("y", layer(x_TD), expected_TD, torch.float32)
    assert seen[0].num_tokens == T


# ---- capacity


@pytest.mark.parametrize("training", [True, False])
def test_each_mode_has_its_own_capacity(training: bool) -> None:
    layer = make_layer(D, capacity_factor=0.5, eval_capacity_factor=1.0, drop_priority="weight").train(training)
    x_TD = torch.randn(40, D)
    routing = layer.router(x_TD)
    expected_TD = layer.experts(x_TD, apply_capacity(routing, 0.5 if training else 1.0, "weight"))
    assert_close("y", layer(x_TD), expected_TD, torch.float32)
    assert not torch.equal(layer(x_TD), layer.experts(x_TD, routing)), "nothing was dropped"


def test_no_capacity_drops_nothing() -> None:
    layer = make_layer(D, eval_capacity_factor=0.1)
    x_TD = torch.randn(40, D)
    assert torch.equal(layer(x_TD), layer.experts(x_TD, layer.router(x_TD)))
    assert not torch.equal(layer(x_TD), layer.eval()(x_TD))


def test_gradients_with_drops() -> None:
    layer = make_layer(D, capacity_factor=0.5)
    x_TD, dy_TD = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    layer(x_TD).backward(dy_TD)
    kept = apply_capacity(layer.router(x_TD), 0.5, "choice")
    assert kept.num_dropped
    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64_TD = x_TD.detach().double().requires_grad_()
    probs_TE = (x64_TD @ p["router.weight"].T).softmax(-1)
    chosen_TK = probs_TE.topk(2).values
    weights_TE = probs_TE / chosen_TK.sum(-1, keepdim=True)
    oracles.expert_ffn(
        x64_TD,
        kept.token_ids_N.tolist(),
        kept.expert_ids_N.tolist(),
        weights_TE[kept.token_ids_N, kept.expert_ids_N],
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
        "swiglu",
    ).backward(dy_TD.double())
    assert x64_TD.grad is not None
    expected = {"x": x64_TD.grad} | {name: value.grad for name, value in p.items()}
    assert_same_gradients(gradients(layer, x_TD), expected)


# ---- soft routing


class _SoftRouter(Router):
    """Soft MoE without normalisation (arXiv 2308.00951 eq. 1-3), two slots per expert."""

    Config = RouterConfig

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.phi = nn.Parameter(torch.randn(dim, 2 * num_experts))

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> SoftRouting:
        logits_TS = x_TD @ self.phi
        logits_TE = logits_TS.view(len(x_TD), self.num_experts, 2).logsumexp(-1)
        return SoftRouting(
            num_experts=self.num_experts,
            dispatch_GMS=logits_TS.softmax(0)[None],
            combine_GMS=logits_TS.softmax(1)[None],
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(-1),
        )

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.phi, std=std)

    @property
    def mean_experts_per_token(self) -> float:
        return self.num_experts


def test_soft_routing_against_the_dense_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "soft_test", _SoftRouter)
    layer = make_layer(D, router={"name": "soft_test"}, num_shared_experts=1)
    x_TD, dy_TD = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    y_TD = layer(x_TD)
    y_TD.backward(dy_TD)

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64_TD = x_TD.detach().double().requires_grad_()
    logits_TS = x64_TD @ p["router.phi"]
    slots_SD = logits_TS.softmax(0).T @ x64_TD
    out_SD = oracles.expert_ffn(
        slots_SD,
        list(range(2 * E)),
        [s // 2 for s in range(2 * E)],
        torch.ones(2 * E, dtype=torch.float64),
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
        "swiglu",
    )
    shared_TD = oracles.dense_ffn(
        x64_TD, p["shared_experts.gate_up_proj.weight"], p["shared_experts.down_proj.weight"], "swiglu"
    )
    expected_TD = logits_TS.softmax(1) @ out_SD + shared_TD
    expected_TD.backward(dy_TD.double())
    assert_close("y", y_TD, expected_TD, torch.float32)
    assert x64_TD.grad is not None
    assert_same_gradients(gradients(layer, x_TD), {"x": x64_TD.grad} | {name: v.grad for name, v in p.items()})
    assert layer.stats.counts_E is not None
    assert layer.stats.counts_E.tolist() == [2] * E


def test_soft_routing_knows_the_z_loss_and_ignores_the_balance_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "soft_test", _SoftRouter)
    from moe.routers.balance import BalanceConfig

    layer = make_layer(D, router={"name": "soft_test"}, balance=BalanceConfig(aux_coef=1.0, z_coef=0.1))
    layer(torch.randn(T, D, requires_grad=True)).sum().backward()
    assert {name for name in layer.stats.sums if name.startswith("loss/")} == {"loss/z"}


# ---- precision


def test_autocast() -> None:
    layer = make_layer(D, num_shared_experts=1, shared_gate=True)
    x_TD, dy_TD = torch.randn(T, D, requires_grad=True), torch.randn(T, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = layer(x_TD)
        logits_TE = layer.router(x_TD).logits_TE
    assert torch.equal(logits_TE, x_TD @ layer.router.weight.T), "the router left fp32"
    assert y_TD.dtype == torch.bfloat16
    y_TD.backward(dy_TD)
    expected_TD, expected = oracle_gradients(layer, x_TD, dy_TD)
    assert_close("y", y_TD, expected_TD, torch.bfloat16)
    for name, value in gradients(layer, x_TD).items():
        assert value.dtype == torch.float32
        assert_close(name, value, expected[name], torch.bfloat16)


def test_bf16_weights_keep_decisions_and_statistics_in_fp32() -> None:
    layer = make_layer(D, router={"name": "noaux_tc"}, balance=MoESpec().balance).to(torch.bfloat16)
    x_TD = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    y_TD = layer(x_TD)
    y_TD.sum().backward()
    assert y_TD.dtype == torch.bfloat16
    routing = layer.router(x_TD)
    assert routing.weights_N.dtype == routing.probs_TE.dtype == routing.logits_TE.dtype == torch.float32
    assert layer.router.bias_E.dtype == torch.float32
    assert {value.dtype for value in layer.stats.sums.values()} == {torch.float32}
    assert layer.stats.counts_E.dtype == torch.int64
    assert layer.router.weight.grad.isfinite().all()


# ---- construction


def test_width_is_needed() -> None:
    with pytest.raises(ValueError, match=r"moe.expert_hidden is not set and no dense_hidden was given"):
        MoELayer(D, MoESpec())
    assert MoELayer(D, MoESpec(granularity=4), dense_hidden=12).experts.down_proj.shape == (8, D, 3)
    assert MoELayer(D, MoESpec(expert_hidden=5), dense_hidden=12).experts.down_proj.shape == (8, D, 5)


def test_names_and_shapes_of_the_weights() -> None:
    layer = make_layer(D, num_shared_experts=2, shared_gate=True, router={"name": "noaux_tc"})
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "router.weight": (E, D),
        "router.bias_E": (E,),
        "experts.gate_up_proj": (E, 10, D),
        "experts.down_proj": (E, D, 5),
        "shared_experts.gate_up_proj.weight": (20, D),
        "shared_experts.down_proj.weight": (D, 10),
        "shared_experts.gate.weight": (1, D),
    }


def test_reset_reaches_every_weight() -> None:
    layer = make_layer(64, expert_hidden=32, num_shared_experts=2, shared_gate=True)
    layer.reset_parameters(0.3)
    for name, value in layer.named_parameters():
        assert value.std().item() == pytest.approx(0.3, rel=0.3), name


def test_moe_layers_by_name() -> None:
    model = nn.Sequential(nn.Linear(D, D), make_layer(D), nn.ModuleDict({"mlp": make_layer(D)}))
    assert list(moe_layers(model)) == ["1", "2.mlp"]
    assert moe_layers(model)["1"] is model[1]
