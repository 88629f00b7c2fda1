"""Soft routings in the layer: mixtures of grouped tokens against a loop in float64, with all gradients."""

from dataclasses import replace

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import gradients, make_layer
from helpers.soft import weighted_layer
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.routers import ROUTERS, Router, RouterConfig
from moe.types import NO_INFO, Routing, SoftRouting, TokenInfo

D, E = 6, 4


class _GivenRouter(Router):
    """Returns what it was given."""

    Config = RouterConfig
    mean_experts_per_token = 1.0
    routing: SoftRouting

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> SoftRouting:
        return self.routing

    def reset_parameters(self, std: float) -> None:
        pass


def make_weights(num_groups: int, num_rows: int, slots_per_expert: int, padding: list[tuple[int, int]]) -> SoftRouting:
    """Random weights with gradient; the rows (group, row) of ``padding`` are zero."""
    shape = (num_groups, num_rows, slots_per_expert * E)
    dispatch_GMS, combine_GMS = torch.randn(shape).softmax(1), torch.randn(shape).softmax(2)
    for group, row in padding:
        dispatch_GMS[group, row] = combine_GMS[group, row] = 0
    return SoftRouting(
        num_experts=E, dispatch_GMS=dispatch_GMS.requires_grad_(), combine_GMS=combine_GMS.requires_grad_()
    )


def soft_layer(monkeypatch: pytest.MonkeyPatch, routing: SoftRouting, **values: object) -> MoELayer:
    monkeypatch.setitem(ROUTERS, "given", _GivenRouter)
    layer = make_layer(D, router={"name": "given"}, **values)
    layer.router.routing = routing
    return layer


def assert_like_the_loop(layer: MoELayer, routing: SoftRouting, x_TD: Tensor, dtype: torch.dtype) -> None:
    """Output, and gradients of the input, both weights of the routing and both of the experts."""
    dy_TD = torch.randn(x_TD.shape).to(x_TD.dtype)
    y_TD = layer(x_TD)
    assert y_TD.dtype == x_TD.dtype
    y_TD.backward(dy_TD)
    got = gradients(layer, x_TD) | {"dispatch": routing.dispatch_GMS.grad, "combine": routing.combine_GMS.grad}

    leaves = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    leaves["x"] = x_TD.detach().double().requires_grad_()
    leaves["dispatch"] = routing.dispatch_GMS.detach().double().requires_grad_()
    leaves["combine"] = routing.combine_GMS.detach().double().requires_grad_()
    expected_TD = weighted_layer(
        leaves["x"],
        replace(routing, dispatch_GMS=leaves["dispatch"], combine_GMS=leaves["combine"]),
        leaves["experts.gate_up_proj"],
        leaves["experts.down_proj"],
        layer.spec.activation,
    )
    expected_TD.backward(dy_TD.double())
    assert_close("y", y_TD, expected_TD, dtype)
    assert got.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert_close(name, got[name], leaf.grad, dtype)


@pytest.mark.parametrize("slots_per_expert", [1, 3])
@pytest.mark.parametrize(("num_groups", "num_rows"), [(1, 7), (3, 5), (5, 1)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_groups_in_order(
    monkeypatch: pytest.MonkeyPatch, num_groups: int, num_rows: int, slots_per_expert: int, activation: str
) -> None:
    routing = make_weights(num_groups, num_rows, slots_per_expert, [])
    layer = soft_layer(monkeypatch, routing, activation=activation)
    assert_like_the_loop(layer, routing, torch.randn(num_groups * num_rows, D, requires_grad=True), torch.float32)


@pytest.mark.parametrize("contiguous", [True, False])
def test_groups_of_any_tokens(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    """Three groups over 13 tokens in a random order, two rows of padding, and a token that is in two groups."""
    ids = [*torch.randperm(13).tolist(), 0, 0]
    ids_GM = torch.tensor(ids).view(3, 5)
    if not contiguous:
        ids_GM = ids_GM.T.contiguous().T
    routing = make_weights(3, 5, 2, [(2, 3)])  # row (2, 4) is a second, real row of token 0
    routing = replace(routing, token_ids_GM=ids_GM)
    layer = soft_layer(monkeypatch, routing)
    assert_like_the_loop(layer, routing, torch.randn(13, D, requires_grad=True), torch.float32)


def test_padding_rows_may_name_any_token(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = make_weights(2, 4, 1, [(1, 2), (1, 3)])
    x_TD, results = torch.randn(6, D), []
    for filler in ([0, 0], [5, 2]):
        given = replace(routing, token_ids_GM=torch.tensor([[0, 1, 2, 3], [4, 5, *filler]]))
        torch.manual_seed(1)
        results.append(soft_layer(monkeypatch, given)(x_TD))
    assert torch.equal(*results)


def test_tokens_of_no_group_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = replace(make_weights(1, 2, 1, []), token_ids_GM=torch.tensor([[3, 1]]))
    y_TD = soft_layer(monkeypatch, routing)(torch.randn(5, D))
    assert y_TD[[1, 3]].abs().min() > 1e-4
    assert not y_TD[[0, 2, 4]].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    routing = make_weights(3, 4, 2, [(2, 3)] if grouped else [])
    if grouped:
        routing = replace(routing, token_ids_GM=torch.tensor([*range(10, -1, -1), 0]).view(3, 4))
    layer = soft_layer(monkeypatch, routing).to(torch.bfloat16)
    x_TD = torch.randn(11 if grouped else 12, D).bfloat16().requires_grad_()
    assert_like_the_loop(layer, routing, x_TD, torch.bfloat16)


@pytest.mark.parametrize("grouped", [False, True])
def test_no_tokens(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    ids_GM = torch.zeros(0, 3, dtype=torch.int64) if grouped else None
    routing = replace(make_weights(0, 3, 2, []), token_ids_GM=ids_GM)
    layer = soft_layer(monkeypatch, routing)
    x_TD = torch.randn(0, D, requires_grad=True)
    y_TD = layer(x_TD)
    assert y_TD.shape == (0, D)
    y_TD.sum().backward()
    assert layer.experts.down_proj.grad is not None


def test_slots_take_the_road_of_sparse_routings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange gets each slot as a token with one expert and weight 1."""
    routing = make_weights(2, 3, 2, [])
    layer, seen = soft_layer(monkeypatch, routing), []

    def exchange(slots_RD: Tensor, slot_routing: Routing, experts: nn.Module, meanwhile: object) -> Tensor:
        seen.append((slots_RD, slot_routing))
        return experts(slots_RD, slot_routing)

    x_TD = torch.randn(6, D)
    expected_TD = layer(x_TD)
    layer.exchange = exchange
    assert torch.equal(layer(x_TD), expected_TD)
    slots_RD, slot_routing = seen[0]
    assert slots_RD.shape == (2 * 2 * E, D)
    assert slot_routing.expert_ids_N.tolist() == [s // 2 for s in range(2 * E)] * 2
    assert slot_routing.top_k == 1
    assert (slot_routing.weights_N == 1).all()
    torch.testing.assert_close(slots_RD.view(2, 2 * E, D), routing.dispatch_GMS.transpose(1, 2) @ x_TD.view(2, 3, D))


def test_load_is_the_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = soft_layer(monkeypatch, make_weights(5, 3, 2, []))
    layer(torch.randn(15, D, requires_grad=True)).sum().backward()
    assert layer.stats.counts_E.tolist() == [10] * E
    assert layer.stats.sums["assigned"] == 10 * E
    assert layer.stats.sums["tokens"] == 15


@pytest.mark.parametrize("grouped", [False, True])
def test_autocast(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    routing = make_weights(3, 4, 2, [])
    if grouped:
        routing = replace(routing, token_ids_GM=torch.randperm(12).view(3, 4))
    layer, x_TD = soft_layer(monkeypatch, routing), torch.randn(12, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = layer(x_TD)
    assert y_TD.dtype == torch.bfloat16
    assert_close("y", y_TD, layer(x_TD), torch.bfloat16)
