"""What runs while rows travel, rows in fewer bits, and everything around the exchange: checkpointing, autocast, no gradients.

Legend: T tokens, D model, E experts, R received rows.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.close import assert_close
from helpers.layer_oracle import make_layer
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.layer import MoELayer
from moe.parallel import trace
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.parallel.exchange.hop import Leg
from moe.parallel.exchange.payload import PAYLOADS
from moe.types import Routing

D, F, E = 16, 8, 8
TOKENS = (7, 5, 0, 6)  # of each rank
NODES = ExchangeConfig(hierarchical=2, overlap_chunks=3)
CHUNKS = ExchangeConfig(overlap_chunks=3)


def new_layer(shared: int = 1) -> MoELayer:
    torch.manual_seed(3)
    layer = make_layer(
        D, num_experts=E, expert_hidden=F, num_shared_experts=shared, router={"name": "topk", "top_k": 3}
    )
    layer.router.get_parameter("weight").data.normal_()
    return layer


def spread(layer: MoELayer, rank: int, world_size: int, config: ExchangeConfig) -> MoELayer:
    num_local = E // world_size
    for key, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, key, nn.Parameter(weight.detach()[rank * num_local : (rank + 1) * num_local].clone()))
    layer.exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size, config, "layers.0.mlp")
    return layer


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    x_TD, dy_TD = torch.randn(2, TOKENS[rank], D, generator=generator)
    return x_TD.requires_grad_(), dy_TD


def gradients(layer: MoELayer, x_TD: Tensor) -> dict[str, Tensor | None]:
    return {"x": x_TD.grad} | {name: p.grad for name, p in layer.named_parameters()}


def step(layer: MoELayer, rank: int, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    x_TD, dy_TD = tokens(rank)
    y_TD = (forward or layer)(x_TD)
    y_TD.backward(dy_TD)
    return {"y": y_TD.detach(), **gradients(layer, x_TD)}


# ---- on the ranks


def names_in_flight() -> list[str]:
    return [one.name for one in trace.in_flight()]


def overlaps(rank: int, world_size: int, config: ExchangeConfig) -> dict[str, list[list[str]]]:
    """What was under way when each part ran."""
    layer = spread(new_layer(), rank, world_size, config)
    assert layer.shared_experts is not None
    seen: dict[str, list[list[str]]] = {"shared": [], "experts": [], "dexperts": [], "dshared": []}
    layer.shared_experts.register_forward_hook(lambda *_: seen["shared"].append(names_in_flight()))

    def watch(module: nn.Module, args: Any, y_RD: Tensor) -> None:
        seen["experts"].append(names_in_flight())
        y_RD.register_hook(lambda _: seen["dexperts"].append(names_in_flight()))

    layer.experts.register_forward_hook(watch)
    layer.shared_experts.down_proj.weight.register_hook(lambda _: seen["dshared"].append(names_in_flight()))
    step(layer, rank)
    return seen


def with_checkpointing(rank: int, world_size: int, config: ExchangeConfig, reentrant: bool) -> dict[str, Any]:
    layer = spread(new_layer(), rank, world_size, config)
    return step(layer, rank, lambda x_TD: checkpoint(layer, x_TD, use_reentrant=reentrant))


def with_autocast(layer: MoELayer, rank: int) -> dict[str, Any]:
    def forward(x_TD: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x_TD)

    x_TD, dy_TD = tokens(rank)
    y_TD = forward(x_TD)
    y_TD.backward(dy_TD.to(y_TD.dtype))
    return {"y": y_TD.detach(), **gradients(layer, x_TD)}


def wire_bytes(rank: int, world_size: int, run: Callable[[MoELayer], object]) -> set[tuple[str, int]]:
    """Kinds of rows that travelled, and their size."""
    calls: list[trace.Collective] = []
    with trace.observe(calls.append):
        run(spread(new_layer(), rank, world_size, ExchangeConfig()))
    return {(call.name, call.unit_bytes) for call in calls if "rows" in call.name}


def one_rank_frozen(rank: int, world_size: int) -> dict[str, Any]:
    """Nothing of rank 0's needs a gradient, tokens and router of the others do; all call backward."""
    layer = spread(new_layer(shared=0), rank, world_size, CHUNKS)
    x_TD, dy_TD = tokens(rank)
    if rank == 0:
        layer.requires_grad_(False)
        x_TD = x_TD.detach()
    y_TD = layer(x_TD)
    assert y_TD.requires_grad
    y_TD.backward(dy_TD)
    return {"y": y_TD.detach(), **gradients(layer, x_TD)}


def twice(rank: int, world_size: int) -> dict[str, Any]:
    layer = spread(new_layer(), rank, world_size, CHUNKS)
    x_TD, dy_TD = tokens(rank)
    y_TD = layer(x_TD)
    y_TD.backward(dy_TD, retain_graph=True)
    y_TD.backward(dy_TD)
    return gradients(layer, x_TD)


def without_gradients(rank: int, world_size: int) -> Tensor:
    layer = spread(new_layer(), rank, world_size, CHUNKS)
    with torch.no_grad():
        y_TD = layer(tokens(rank)[0])
    assert not y_TD.requires_grad
    return y_TD


def legs_left(rank: int, world_size: int, config: ExchangeConfig) -> int:
    """Plans of a step that are still there after it, without the garbage collector's help."""
    gc.collect()
    gc.disable()
    try:
        step(spread(new_layer(), rank, world_size, config), rank)
        return sum(isinstance(thing, Leg) for thing in gc.get_objects())
    finally:
        gc.enable()


def all_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    nodes = {"nodes": NODES} if world_size == 4 else {}
    found: dict[str, Any] = {"step": step(spread(new_layer(), rank, world_size, CHUNKS), rank)}
    for name, config in {"chunks": CHUNKS, **nodes}.items():
        found[f"overlaps_{name}"] = overlaps(rank, world_size, config)
        found[f"legs_left_{name}"] = legs_left(rank, world_size, config)
        for kind in ("non_reentrant", "reentrant"):
            found[f"{kind}_{name}"] = with_checkpointing(rank, world_size, config, kind == "reentrant")
        for payload in ("bf16", "fp8"):
            layer = spread(new_layer(shared=0), rank, world_size, replace(config, payload=payload))
            found[f"{payload}_{name}"] = step(layer, rank)
    found["autocast"] = with_autocast(spread(new_layer(), rank, world_size, CHUNKS), rank)
    found["autocast_bytes"] = wire_bytes(rank, world_size, lambda layer: with_autocast(layer, rank))
    found["frozen"] = one_rank_frozen(rank, world_size)
    found["twice"] = twice(rank, world_size)
    found["no_grad"] = without_gradients(rank, world_size)
    found["left"] = trace.in_flight()
    return found


@pytest.fixture(scope="module", params=(2, 4), ids=lambda size: f"{size}_ranks")
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, request.param, timeout=180)


def kinds(results: list[dict[str, Any]]) -> list[str]:
    return ["chunks", "nodes"] if len(results) == 4 else ["chunks"]


# ---- what runs meanwhile


def test_shared_experts_run_while_rows_travel(results: list[dict[str, Any]]) -> None:
    """Forward: the first chunk, labels and weights are on their way. Backward: its gradient is on its way back."""
    for kind in kinds(results):
        for found in results:
            (forward,), (backward,) = found[f"overlaps_{kind}"]["shared"], found[f"overlaps_{kind}"]["dshared"]
            assert "forward dispatch rows, chunk 1 of 3, hop 1" in forward
            assert {"forward dispatch labels", "forward dispatch weights, hop 1"} <= set(forward)
            last_hop = 2 if kind == "nodes" else 1
            assert f"backward combine rows, chunk 1 of 3, hop {last_hop}" in backward


def test_experts_run_while_other_chunks_travel(results: list[dict[str, Any]]) -> None:
    for found in results:
        seen = found["overlaps_chunks"]
        assert seen["experts"] == [
            ["forward dispatch rows, chunk 2 of 3, hop 1"],
            ["forward combine rows, chunk 1 of 3, hop 1", "forward dispatch rows, chunk 3 of 3, hop 1"],
            ["forward combine rows, chunk 2 of 3, hop 1"],
        ]
        assert seen["dexperts"] == [
            ["backward dispatch rows, chunk 2 of 3, hop 1"],
            ["backward combine rows, chunk 3 of 3, hop 1", "backward dispatch rows, chunk 1 of 3, hop 1"],
            ["backward combine rows, chunk 2 of 3, hop 1"],
        ]


def test_both_hops_travel_while_experts_run(results: list[dict[str, Any]]) -> None:
    if len(results) != 4:
        pytest.skip("two nodes of two ranks")
    for found in results:
        first, second, third = found["overlaps_nodes"]["experts"]
        assert {"forward dispatch rows, chunk 2 of 3, hop 2", "forward dispatch rows, chunk 3 of 3, hop 1"} <= set(
            first
        )
        assert {"forward combine rows, chunk 1 of 3, hop 1", "forward dispatch rows, chunk 3 of 3, hop 2"} <= set(
            second
        )
        assert {"forward combine rows, chunk 1 of 3, hop 2", "forward combine rows, chunk 2 of 3, hop 1"} <= set(third)


def test_nothing_stays_on_record(results: list[dict[str, Any]]) -> None:
    assert [found["left"] for found in results] == [()] * len(results)


def test_a_step_leaves_no_indices_for_the_garbage_collector(results: list[dict[str, Any]]) -> None:
    for kind in kinds(results):
        assert [found[f"legs_left_{kind}"] for found in results] == [0] * len(results)


# ---- around the exchange


def assert_same(got: dict[str, Any], expected: dict[str, Any], rank: int, factor: float = 1.0) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(f"rank {rank} {name}", got[name], factor * value, torch.float32)


@pytest.mark.parametrize("name", ["non_reentrant_chunks", "reentrant_chunks", "non_reentrant_nodes", "reentrant_nodes"])
def test_under_activation_checkpointing(results: list[dict[str, Any]], name: str) -> None:
    if name.endswith("nodes") and len(results) != 4:
        pytest.skip("two nodes of two ranks")
    for rank, found in enumerate(results):
        assert_same(found[name], found["step"], rank)


def test_backward_twice(results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        expected = {name: value for name, value in found["step"].items() if name != "y"}
        assert_same(found["twice"], expected, rank, factor=2)


def test_without_gradients(results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        assert_close(f"rank {rank}", found["no_grad"], found["step"]["y"], torch.float32)


def test_a_rank_that_needs_no_gradient_serves_the_others(results: list[dict[str, Any]]) -> None:
    """Rank 0 has frozen weights and tokens; what the others' tokens get from its experts is complete."""
    for rank in range(1, len(results)):
        whole = new_layer(shared=0)
        expected = step(whole, rank)
        for name in ("y", "x", "router.weight"):
            assert_close(f"rank {rank} {name}", results[rank]["frozen"][name], expected[name], torch.float32)
    assert all(results[0]["frozen"][name] is None for name in ("x", "router.weight", "experts.down_proj"))


def test_autocast_is_that_of_the_whole_layer(results: list[dict[str, Any]]) -> None:
    """And rows travel in its dtype, both ways."""
    for rank, found in enumerate(results):
        expected = with_autocast(new_layer(), rank)
        for name in ("y", "x", "router.weight"):
            assert found["autocast"][name].dtype == expected[name].dtype
            assert_close(f"rank {rank} {name}", found["autocast"][name], expected[name], torch.bfloat16)
        ways = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
        assert found["autocast_bytes"] == {(f"{way} rows, hop 1", 2 * D) for way in ways}


# ---- rows in fewer bits


def rounded(name: str, rows_RD: Tensor) -> Tensor:
    payload = PAYLOADS[name]
    return payload.decode(payload.encode(rows_RD, torch.float32)).float()


class _Straight(torch.autograd.Function):
    """Rounds in both directions, as the wire does."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, payload: str) -> Tensor:
        ctx.payload = payload
        return rounded(payload, rows_RD)

    @staticmethod
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor, None]:
        return rounded(ctx.payload, drows_RD), None


def rounded_on_the_way(payload: str, rank: int, world_size: int) -> dict[str, Any]:
    """A whole layer that rounds what a straight exchange would send."""
    layer, num_local = new_layer(shared=0), E // world_size

    def exchange(x_TD: Tensor, routing: Routing, experts: Any, meanwhile: object) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for destination in range(world_size):
            there_N = (routing.expert_ids_N // num_local == destination).nonzero()[:, 0]
            part = replace(
                routing,
                token_ids_N=routing.token_ids_N[there_N],
                expert_ids_N=routing.expert_ids_N[there_N],
                weights_N=routing.weights_N[there_N],
                top_k=None,
            )
            y_TD = y_TD + _Straight.apply(experts(_Straight.apply(x_TD, payload), part), payload)
        return y_TD

    layer.exchange = exchange
    return step(layer, rank)


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_payload_rounds_rows_and_nothing_else(results: list[dict[str, Any]], payload: str) -> None:
    """As if every row were rounded on its way, forward and backward: sums are fp32, gradients pass straight through."""
    world_size = len(results)
    expected = [rounded_on_the_way(payload, rank, world_size) for rank in range(world_size)]
    for rank, found in enumerate(results):
        got = found[f"{payload}_chunks"]
        for name in ("y", "x", "router.weight"):
            assert_close(f"rank {rank} {name}", got[name], expected[rank][name], torch.float32)
        mine = slice(rank * E // world_size, (rank + 1) * E // world_size)
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            assert_close(f"rank {rank} {name}", got[name], sum(one[name] for one in expected)[mine], torch.float32)


@pytest.mark.parametrize(("payload", "bound"), [("bf16", 0.02), ("fp8", 0.12)])
def test_payload_error(results: list[dict[str, Any]], payload: str, bound: float) -> None:
    """RMS error over RMS of outputs and gradients; in two stages sums are rounded once more."""
    for kind in kinds(results):
        for rank, found in enumerate(results):
            exact = step(new_layer(shared=0), rank)
            for name in ("y", "x", "router.weight"):
                if TOKENS[rank]:
                    error = (found[f"{payload}_{kind}"][name] - exact[name]).norm() / exact[name].norm()
                    assert bound / 30 < error < bound, f"{kind}, rank {rank}, {name}: {error}"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_fp8_error_of_an_element(scale: float) -> None:
    """2^-4 of the element, or half of the smallest step where it is far below the row's largest."""
    rows_RD = torch.randn(50, 64) * torch.logspace(-6, 0, 64) * scale
    rows_RD[0] = 0
    error_RD = (rounded("fp8", rows_RD) - rows_RD).abs()
    floor_R1 = rows_RD.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert (error_RD <= torch.maximum(rows_RD.abs() * 2**-4, floor_R1) * 1.001).all()
    assert error_RD.max() > 0
    assert PAYLOADS["fp8"].encode(rows_RD, torch.float32).shape == (50, PAYLOADS["fp8"].row_bytes(64, torch.float32))


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("dim", [1, 6, 16])
@pytest.mark.parametrize("name", PAYLOADS)
def test_wire_rows_of_any_shape(name: str, dim: int, num_rows: int) -> None:
    rows_RD = torch.randn(num_rows, dim)
    wire = PAYLOADS[name].encode(rows_RD, torch.float32)
    assert wire.shape[1] * wire.element_size() == PAYLOADS[name].row_bytes(dim, torch.float32)
    decoded_RD = PAYLOADS[name].decode(wire)
    assert decoded_RD.shape == rows_RD.shape
    assert (decoded_RD - rows_RD).abs().le(0.07 * rows_RD.abs()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fp8_hides_nothing(value: float) -> None:
    rows_RD = torch.randn(3, 8)
    rows_RD[1, 2] = value
    finite_RD = rounded("fp8", rows_RD).isfinite()
    assert finite_RD[[0, 2]].all()
    assert not finite_RD[1, 2]
