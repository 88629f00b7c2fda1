"""The exchange against the double loop, and a layer with spread experts against the same layer whole, with every option.

Outputs and the gradients of inputs, combine weights, routers and experts, on every rank; and what travels.

Legend: T tokens, D model, E experts, e local experts, W ranks, N assignments.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import oracles
from helpers.close import assert_close
from helpers.ffn_case import Case, expect, make_case, routing_of, with_tensors
from helpers.layer_oracle import make_layer
from helpers.ranks import run_ranks
from torch import Tensor, nn

from moe.experts import ExpertBank
from moe.layer import MoELayer
from moe.parallel import trace
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.parallel.exchange.volume import Volume, count_bytes, exchange_bytes

D, F = 6, 4
SIZES = (2, 4)
# Options by name; those with nodes are for 4 ranks. 3 and 5 chunks leave some without tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks": {"overlap_chunks": 3},
    "plain": {"dedup": False},
    "plain_chunks": {"dedup": False, "overlap_chunks": 2},
    "nodes": {"hierarchical": 2},
    "nodes_chunks": {"hierarchical": 2, "overlap_chunks": 5},
}
RUNS = [
    (size, name) for size in SIZES for name, options in OPTIONS.items() if size == 4 or "hierarchical" not in options
]
NODE_SIZE = 2

# ---- the exchange alone: any list of assignments ----

# Experts of each token, token by token, for each of 4 ranks; with 2 ranks the first two are used, with 8 experts always.
Assignments = list[list[list[int]]]
TWO_EACH = [[[0, 1], [2, 7], [5, 4]], [[3, 6], [6, 0]], [[1, 2], [7, 0], [4, 3], [5, 1]], [[7, 6], [0, 4]]]
ASSIGNMENTS: dict[str, Assignments] = {
    "top_2_uneven_tokens": TWO_EACH,
    "a_rank_without_tokens": [TWO_EACH[0], [], TWO_EACH[2], []],
    "no_rank_has_tokens": [[], [], [], []],
    "all_to_the_last_rank": [[[7, 6], [6, 7], [7, 6]], [[6, 7]], [[7, 6], [6, 7]], [[7, 6]]],
    "all_to_expert_0": [[[0], [0]], [[0]], [[0], [0], [0]], [[0]]],
    "nothing_for_rank_0": [[[7, 6], [4, 5], [6, 4]], [[5, 6]], [[7, 4], [6, 5]], [[5, 7]]],
    "every_assignment_of_a_rank_dropped": [[[0, 7], [3, 4]], [[], [], []], [[1, 6]], [[5, 2], []]],
    "every_assignment_dropped": [[[], []], [[]], [[]], [[], []]],
    "variable_k": [[[], [3], [0, 1, 2, 3, 4, 5, 6, 7]], [[7, 5], []], [[4, 2, 0]], [[6], [1, 7, 3], []]],
    "k_above_local_experts": [[[0, 1, 2, 3, 4, 7], [5, 6, 7, 4, 3, 2]], [[7, 6, 5, 4, 3, 2]], [[1, 0, 4, 5, 6, 7]], []],
}
NUM_EXPERTS = 8


def case_of(assignments: Assignments, rank: int, dtype: torch.dtype = torch.float32) -> Case:
    tokens = assignments[rank]
    case = make_case(
        [t for t, experts in enumerate(tokens) for _ in experts],
        [e for experts in tokens for e in experts],
        num_tokens=len(tokens),
        num_experts=NUM_EXPERTS,
        dim=D,
        hidden=F,
        dtype=dtype,
        seed=1 + rank,
    )
    weights = make_case([], [], num_tokens=0, num_experts=NUM_EXPERTS, dim=D, hidden=F, dtype=dtype)
    return with_tensors(case, w_up_EHD=weights.w_up_EHD, w_down_EDF=weights.w_down_EDF)


def exchange_case(case: Case, rank: int, world_size: int, config: ExchangeConfig) -> dict[str, Any]:
    num_local = NUM_EXPERTS // world_size
    mine = slice(rank * num_local, (rank + 1) * num_local)
    bank = ExpertBank(num_local, D, F, "swiglu")
    bank.gate_up_proj, bank.down_proj = nn.Parameter(case.w_up_EHD[mine]), nn.Parameter(case.w_down_EDF[mine])
    x_TD, weights_N = case.x_TD.clone().requires_grad_(), case.weights_N.clone().requires_grad_()
    calls: list[trace.Collective] = []
    exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size, config, "layer")
    with trace.observe(calls.append), count_bytes(NODE_SIZE) as volume:
        y_TD = exchange(x_TD, routing_of(case, weights_N), bank)
        y_TD.backward(case.dy_TD)
    assert trace.in_flight() == ()
    return {
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "dweights": weights_N.grad,
        "dw_up": bank.gate_up_proj.grad,
        "dw_down": bank.down_proj.grad,
        "calls": [(call.name, call.peers, call.send, call.receive) for call in calls],
        "volume": Volume(intra=dict(volume.intra), inter=dict(volume.inter)),
    }


# ---- whole layers: routers, capacity, shared experts ----

LAYERS: dict[str, dict[str, Any]] = {
    "topk": {"router": {"name": "topk", "top_k": 2}},
    "topk_shared_gelu": {"router": {"name": "topk", "top_k": 3}, "activation": "gelu", "num_shared_experts": 1},
    "switch": {"router": {"name": "switch", "jitter": 0.0}},
    "noaux_tc_groups": {"router": {"name": "noaux_tc", "top_k": 2, "num_groups": 4, "top_k_groups": 2}},
    "noisy_topk_in_eval": {"router": {"name": "noisy_topk", "top_k": 2}},
    "all_experts": {"router": {"name": "topk", "top_k": 8}},
    "capacity": {"router": {"name": "topk", "top_k": 2}, "capacity_factor": 0.5},
    "capacity_by_weight": {
        "router": {"name": "noaux_tc", "top_k": 2},
        "capacity_factor": 0.6,
        "drop_priority": "weight",
    },
}
TOKENS = (5, 0, 9, 4)  # of each rank


def whole_layer(name: str) -> MoELayer:
    torch.manual_seed(3)
    layer = make_layer(D, num_experts=NUM_EXPERTS, expert_hidden=F, **LAYERS[name])
    with torch.no_grad():
        layer.router.get_parameter("weight").normal_(std=0.5)  # noisy_topk starts at zero: all experts would tie
        for bias_E in layer.router.buffers():
            bias_E.copy_(torch.randn(NUM_EXPERTS))
    return layer.train(name != "noisy_topk_in_eval")


def layer_input(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    x_TD, dy_TD = torch.randn(2, TOKENS[rank], D, generator=generator)
    return x_TD.requires_grad_(), dy_TD


def layer_results(layer: MoELayer, rank: int) -> dict[str, Any]:
    x_TD, dy_TD = layer_input(rank)
    y_TD = layer(x_TD)
    y_TD.backward(dy_TD)
    dropped = layer.finish_step().sums.get("dropped")
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y_TD.detach(), "x": x_TD.grad, "dropped": dropped, **gradients}


def spread_layer(name: str, rank: int, world_size: int, config: ExchangeConfig) -> dict[str, Any]:
    layer, num_local = whole_layer(name), NUM_EXPERTS // world_size
    for key, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, key, nn.Parameter(weight.detach()[rank * num_local : (rank + 1) * num_local].clone()))
    layer.exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size, config)
    return layer_results(layer, rank)


# ---- one start of the ranks runs everything ----


def all_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in (name for size, name in RUNS if size == world_size):
        config, one = ExchangeConfig(**OPTIONS[option]), {}
        for name, assignments in ASSIGNMENTS.items():
            one[name] = exchange_case(case_of(assignments, rank), rank, world_size, config)
        one["bf16"] = exchange_case(case_of(TWO_EACH, rank, torch.bfloat16), rank, world_size, config)
        for name in LAYERS:
            one[name] = spread_layer(name, rank, world_size, config)
        found[option] = one
    return found


@functools.cache
def results_of(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, world_size, timeout=180)


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}_ranks-{run[1]}")
def run(request: pytest.FixtureRequest) -> tuple[int, str]:
    return request.param


@pytest.fixture(scope="module")
def results(run: tuple[int, str]) -> list[dict[str, Any]]:
    world_size, option = run
    return [of_rank[option] for of_rank in results_of(world_size)]


def check_exchange(results: list[dict[str, Any]], name: str, assignments: Assignments, dtype: torch.dtype) -> None:
    world_size = len(results)
    num_local = NUM_EXPERTS // world_size
    expected = [expect(case_of(assignments, rank, dtype)) for rank in range(world_size)]
    for rank in range(world_size):
        got = results[rank][name]
        for key in ("y", "dx", "dweights"):
            assert_close(f"rank {rank} {key}", got[key], expected[rank][key], dtype)
        assert got["y"].dtype == got["dx"].dtype == got["dw_up"].dtype == dtype
        assert got["dweights"].dtype == torch.float32
        mine = slice(rank * num_local, (rank + 1) * num_local)
        for key in ("dw_up", "dw_down"):
            assert_close(f"rank {rank} {key}", got[key], sum(e[key] for e in expected)[mine], dtype)  # type: ignore[index]


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_exchange_is_the_double_loop(results: list[dict[str, Any]], name: str) -> None:
    check_exchange(results, name, ASSIGNMENTS[name], torch.float32)


def test_exchange_in_bf16(results: list[dict[str, Any]]) -> None:
    check_exchange(results, "bf16", TWO_EACH, torch.bfloat16)


def test_another_result_fails(results: list[dict[str, Any]]) -> None:
    """The comparison sees an error of 1e-4, and experts that miss what another rank's tokens gave them."""
    name = "top_2_uneven_tokens"
    wrong = {name: results[0][name] | {"y": results[0][name]["y"] * (1 + 1e-4)}}
    with pytest.raises(AssertionError, match="rank 0 y"):
        check_exchange([wrong, *results[1:]], name, TWO_EACH, torch.float32)
    with pytest.raises(AssertionError, match="rank 0 dw_up"):
        check_exchange(results, name, [TWO_EACH[0], [], *TWO_EACH[2:]], torch.float32)


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("world_size", SIZES)
def test_each_token_travels_once_per_destination(world_size: int, name: str) -> None:
    results = [of_rank["default"] for of_rank in results_of(world_size)]
    num_local = NUM_EXPERTS // world_size
    pairs = [
        {(t, e // num_local) for t, experts in enumerate(ASSIGNMENTS[name][rank]) for e in experts}
        for rank in range(world_size)
    ]
    for rank in range(world_size):
        to_W = tuple(sum(1 for _, s in pairs[rank] if s == to) for to in range(world_size))
        from_W = tuple(sum(1 for _, s in pairs[r] if s == rank) for r in range(world_size))
        rows = {call: (send, receive) for call, _, send, receive in results[rank][name]["calls"] if "rows" in call}
        assert rows == {
            "forward dispatch rows, hop 1": (to_W, from_W),
            "forward combine rows, hop 1": (from_W, to_W),
            "backward dispatch rows, hop 1": (to_W, from_W),
            "backward combine rows, hop 1": (from_W, to_W),
        }


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_bytes_are_those_of_the_routing(results: list[dict[str, Any]], run: tuple[int, str], name: str) -> None:
    """What is counted at the collectives, added up over ranks, is what the routings say, on each link and of each kind."""
    world_size, option = run
    expected, counted = Volume(), Volume()
    for rank in range(world_size):
        case = case_of(ASSIGNMENTS[name], rank)
        routing, config = routing_of(case, case.weights_N), ExchangeConfig(**OPTIONS[option])
        if "hierarchical" not in OPTIONS[option]:
            config = replace(config, hierarchical="off")
        caused = exchange_bytes(routing, rank, world_size, D, torch.float32, config, node_size=NODE_SIZE)
        for link in ("intra", "inter"):
            for kind, number in getattr(caused, link).items():
                getattr(expected, link)[kind] += number
            for kind, number in getattr(results[rank][name]["volume"], link).items():
                getattr(counted, link)[kind] += number
    for link in ("intra", "inter"):
        assert {k: v for k, v in getattr(counted, link).items() if v} == {
            k: v for k, v in getattr(expected, link).items() if v
        }


def test_all_ranks_issue_the_same_collectives(results: list[dict[str, Any]]) -> None:
    """In the same order, whatever the tokens: no rank can wait for one that another left out."""
    expected = [call for call, *_ in results[0]["top_2_uneven_tokens"]["calls"]]
    assert len(expected) >= 6
    for name in ASSIGNMENTS:
        for found in results:
            assert [call for call, *_ in found[name]["calls"]] == expected, name


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_whole_layer(results: list[dict[str, Any]], name: str) -> None:
    world_size = len(results)
    num_local = NUM_EXPERTS // world_size
    expected = [layer_results(whole_layer(name), rank) for rank in range(world_size)]
    if "capacity" in name:
        assert sum(one["dropped"] for one in expected) > 0
    experts = {key for key in expected[0] if key.startswith("experts.")}
    assert len(experts) == 2
    for rank in range(world_size):
        got = results[rank][name]
        assert got.keys() == expected[rank].keys()
        assert got["dropped"] == expected[rank]["dropped"]
        for key in got.keys() - experts - {"dropped"}:
            assert_close(f"rank {rank} {key}", got[key], expected[rank][key], torch.float32)
        mine = slice(rank * num_local, (rank + 1) * num_local)
        for key in experts:
            whole = sum(one[key] for one in expected)
            assert_close(f"rank {rank} {key}", got[key], whole[mine], torch.float32)


def test_routers_get_gradients(results: list[dict[str, Any]]) -> None:
    """A rank with tokens trains its router; one without still gets zeros, which the average over ranks needs."""
    for name in LAYERS:
        assert results[0][name]["router.weight"].abs().max() > 1e-3, name
        assert results[1][name]["router.weight"].abs().max() == 0, name


def test_whole_layer_is_the_double_loop() -> None:
    """What the spread layers are compared with is right itself."""
    layer = whole_layer("topk")
    x_TD, _ = layer_input(0)
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    ids, weights_N = oracles.softmax_topk(x_TD.detach().double() @ p["router.weight"].T, 2, True)
    y_TD = oracles.expert_ffn(
        x_TD.detach().double(),
        [t for t in range(TOKENS[0]) for _ in range(2)],
        ids,
        weights_N,
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
        "swiglu",
    )
    assert_close("y", layer(x_TD), y_TD, torch.float32)
