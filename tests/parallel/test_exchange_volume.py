"""Bytes: the mean over all routings, what dedup saves at the collective, and the options' errors.

Legend: T tokens, D model, E experts, K top-k, W ranks, L ranks per node.
"""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from moe.experts import ExpertBank
from moe.parallel.exchange.backends import make_exchange
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.deepep import _table
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.parallel.exchange.stages import stages_of
from moe.parallel.exchange.volume import Volume, count_bytes, exchange_bytes, expected_bytes
from moe.train.config import parse_config
from moe.types import Routing

# What issue and documentation promise: rows and all that goes with them, against one row per assignment.
LARGEST_SHARE = {8: 0.67, 4: 0.46, 2: 0.26}
CASES = {
    "flat": (4, None, {}),
    "flat_over_nodes": (4, 2, {"hierarchical": "off", "overlap_chunks": 3}),
    "two_stage": (4, 2, {"hierarchical": 2}),
    "plain": (4, 2, {"dedup": False}),
    "fp8": (2, None, {"payload": "fp8"}),
}


def routing_of(choices: list[tuple[int, ...]], num_experts: int) -> Routing:
    expert_ids_N = torch.tensor([e for experts in choices for e in experts], dtype=torch.int64)
    return Routing(
        num_tokens=len(choices),
        num_experts=num_experts,
        token_ids_N=torch.tensor([t for t, experts in enumerate(choices) for _ in experts], dtype=torch.int64),
        expert_ids_N=expert_ids_N,
        weights_N=torch.rand(len(expert_ids_N)) + 0.1,
        counts_E=torch.bincount(expert_ids_N, minlength=num_experts),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_expectation_is_the_mean_over_all_choices(name: str) -> None:
    num_ranks, node_size, options = CASES[name]
    config, num_experts, top_k = ExchangeConfig(**options), 8, 3
    expected = expected_bytes(7, top_k, num_experts, num_ranks, 5, torch.bfloat16, config, node_size)
    choices = list(itertools.combinations(range(num_experts), top_k))
    routing = routing_of(choices, num_experts)
    sums = {"intra": dict.fromkeys(expected.intra, 0.0), "inter": dict.fromkeys(expected.inter, 0.0)}
    for rank in range(num_ranks):
        caused = exchange_bytes(routing, rank, num_ranks, 5, torch.bfloat16, config, node_size)
        for link, found in (("intra", caused.intra), ("inter", caused.inter)):
            for kind, number in found.items():
                # counts do not grow with tokens
                sums[link][kind] += number / num_ranks * (1 if "counts" in kind else 7 / len(choices))
    assert sums["intra"] == pytest.approx(expected.intra)
    assert sums["inter"] == pytest.approx(expected.inter)
    assert expected.total() > 0


def test_two_stages_cross_between_nodes_once_per_node() -> None:
    """Token 0 has experts on all ranks of the other node, token 1 on one of its own."""
    routing = routing_of([(4, 5, 6, 7), (2,)], 8)
    config = ExchangeConfig(hierarchical=2)
    caused = exchange_bytes(routing, 0, 4, 10, torch.float32, config, node_size=2)
    assert caused.inter["forward dispatch rows"] == caused.inter["backward combine rows"] == 1 * 40
    assert caused.intra["forward dispatch rows"] == 2 * 40  # from rank 2 to rank 3, and from rank 0 to rank 1
    straight = exchange_bytes(routing, 0, 4, 10, torch.float32, ExchangeConfig(hierarchical="off"), node_size=2)
    assert straight.inter["forward dispatch rows"] == 2 * 40


# ---- measured at the collective: uniform routing, K = 8


def shares_on_one_rank(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    """Bytes sent with and without dedup in a layer of 256 experts of which each token has 8, D = 2048 in bf16."""
    num_experts, top_k, num_tokens, dim = 256, 8, 256 // world_size, 2048
    rng = random.Random(rank)
    routing = routing_of([tuple(rng.sample(range(num_experts), top_k)) for _ in range(num_tokens)], num_experts)
    bank = ExpertBank(num_experts // world_size, dim, 1, "gelu").bfloat16()
    found = {}
    for name, options in (("dedup", {}), ("plain", {"dedup": False})):
        x_TD = torch.randn(num_tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size, ExchangeConfig(**options))
        with count_bytes(world_size) as volume:
            exchange(x_TD, routing, bank).sum().backward()
        found[name] = {way: volume.total(way) for way in ("forward dispatch", "forward combine", "backward", "")}
    return found


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_dedup_moves_what_was_promised(world_size: int) -> None:
    """In both directions, with labels, weights and counts."""
    ranks = run_ranks(shares_on_one_rank, world_size, timeout=120)
    for way in ranks[0]["dedup"]:
        dedup, plain = (sum(found[name][way] for found in ranks) for name in ("dedup", "plain"))
        assert 0.8 * LARGEST_SHARE[world_size] < dedup / plain <= LARGEST_SHARE[world_size], way


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_chunks": 0}, r"parallel\.exchange\.overlap_chunks=0 must be at least 1"),
        ({"hierarchical": "on"}, r"parallel\.exchange\.hierarchical='on' must be 'auto', 'off' or the ranks per node"),
        ({"hierarchical": True}, r"hierarchical=True must be"),
        ({"hierarchical": -2}, r"hierarchical=-2 must be"),
        ({"payload": "int8"}, r"parallel\.exchange\.payload='int8' is unknown; use one of \['model', 'bf16', 'fp8'\]"),
        ({"backend": "nccl"}, r"parallel\.exchange\.backend='nccl' is unknown"),
        ({"dedup": False, "hierarchical": 2}, r"hierarchical=2 needs parallel\.exchange\.dedup=true"),
        ({"backend": "deepep", "payload": "fp8"}, r"payload=fp8 does not go with backend='deepep'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExchangeConfig(**options)


def test_yaml_off_is_off() -> None:
    assert parse_config({"parallel": {"exchange": {"hierarchical": False}}}).parallel.exchange.hierarchical == "off"


def test_options_are_a_section_of_a_run() -> None:
    exchange = {"overlap_chunks": 2, "hierarchical": 4, "payload": "bf16"}
    config = parse_config({"parallel": {"exchange": exchange}})
    assert config.parallel.exchange == ExchangeConfig(**exchange)
    assert parse_config(config.model_dump()) == config
    for section, message in (
        ({"overlap_chunk": 2}, r"parallel\.exchange\.overlap_chunk is unknown; did you mean 'overlap_chunks'\?"),
        ({"overlap_chunks": "two"}, r"config key parallel\.exchange\.overlap_chunks='two'"),
        ({"overlap_chunks": 0}, r"^parallel\.exchange\.overlap_chunks=0 must be at least 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_config({"parallel": {"exchange": section}})


def test_nodes_must_divide_the_group() -> None:
    with pytest.raises(ValueError, match=r"hierarchical=3 does not divide parallel\.ep_size=4"):
        stages_of(None, 0, 4, ExchangeConfig(hierarchical=3))


@pytest.mark.parametrize(
    ("local_world_size", "options", "num_stages"),
    [
        ("4", {}, 1),
        ("8", {}, 1),
        ("1", {}, 1),
        ("3", {}, 1),
        ("2", {"hierarchical": "off"}, 1),
        ("2", {"dedup": False}, 1),
    ],
)
def test_auto_is_straight_unless_the_group_spans_nodes(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str, options: dict[str, Any], num_stages: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert len(stages_of(None, 0, 4, ExchangeConfig(**options))) == num_stages


def test_deepep_needs_its_package() -> None:
    with pytest.raises(ValueError, match=r"backend='deepep' needs the package deep_ep; install it"):
        make_exchange(None, 0, 1, ExchangeConfig(backend="deepep"), "layer")


def test_deepep_gets_a_table_of_choices() -> None:
    """Tokens with fewer experts than others are filled up with -1; weights keep their gradient."""
    routing = routing_of([(3, 1), (), (2, 0, 5)], 6)
    shuffled = torch.tensor([4, 0, 2, 1, 3])
    weights_N = routing.weights_N[shuffled].requires_grad_()
    routing = dataclasses.replace(
        routing,
        token_ids_N=routing.token_ids_N[shuffled],
        expert_ids_N=routing.expert_ids_N[shuffled],
        weights_N=weights_N,
    )
    ids_TK, weights_TK = _table(routing)
    assert ids_TK.tolist() == [[3, 1, -1], [-1, -1, -1], [5, 2, 0]]
    assert weights_TK[2].tolist() == [weights_N[0].item(), weights_N[2].item(), weights_N[4].item()]
    (dweights_N,) = torch.autograd.grad(weights_TK[2, 0] * 3 + weights_TK[0, 1], weights_N)
    assert dweights_N.tolist() == [3, 0, 0, 1, 0]


def test_volume_adds_up_by_word() -> None:
    volume = Volume(intra={"forward dispatch rows": 1, "backward combine rows": 2}, inter={"forward combine rows": 4})
    assert (volume.total(), volume.total("combine"), volume.total("forward"), volume.total("dispatch")) == (7, 6, 5, 1)
