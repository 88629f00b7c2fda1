"""Every router at expert parallel 1 and 2: the same output, the same gradients; and training steps through the engine.

Each rank runs the whole layer and the spread one on its own tokens, with the same random state. A rank's tokens are whole
sequences, as many as the other rank's but of another length, or of length 0.

Legend: B sequences, L length, D model, E experts.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.layer_oracle import make_layer
from helpers.ranks import run_ranks
from tiny_run import Run, Trace, make_engine, train_step
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.parallel.engine import is_expert_parameter
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.routers import ROUTERS
from moe.routers.balance import BalanceConfig

D, F, E, B = 6, 5, 8, 4
LENGTHS = {"uneven": (3, 5), "one_without": (4, 0)}  # of each rank's sequences
TOLERANCE = 1e-5
# Routers whose default grouping sees later tokens, and how a causal model may use them.
IN_A_MODEL: dict[str, dict[Any, Any]] = {
    "soft": {"group": "position", "group_size": 4},
    "expert_choice": {"group_size": 4},
    "sinkhorn": {"accept_leak": True},
    "mixture_of_tokens": {"group_size": 4},
    "kmeans": {"update_every": 1, "num_samples": 16},
}


def whole_layer(name: str) -> MoELayer:
    torch.manual_seed(3)
    balance = BalanceConfig(aux_coef=0.1, z_coef=0.1)
    layer = make_layer(D, num_experts=E, expert_hidden=F, router={"name": name}, balance=balance)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            if parameter.dim() > 1:
                parameter.normal_()  # some start at zero, where all experts tie
    return layer


def spread(layer: MoELayer, rank: int, world_size: int) -> MoELayer:
    num_local = E // world_size
    for key, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, key, nn.Parameter(weight.detach()[rank * num_local : (rank + 1) * num_local].clone()))
    layer.exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size)
    return layer


def results(layer: MoELayer, rank: int, length: int) -> dict[str, Tensor]:
    """Output and gradients; a parameter without one has none in either layer."""
    torch.manual_seed(10 + rank)
    x_BLD, dy_BLD = torch.randn(2, B, length, D)
    layer.context.input_ids_T = torch.randint(1000, (B * length,))
    x_BLD.requires_grad_()
    torch.manual_seed(20 + rank)
    y_BLD = layer(x_BLD)
    y_BLD.backward(dy_BLD)
    assert x_BLD.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, **gradients}


def compare(name: str, rank: int, world_size: int, length: int) -> dict[str, dict[str, float]]:
    """Largest difference of each tensor of the spread layer from the whole one's, and the size of that."""
    expected = results(whole_layer(name), rank, length)
    got = results(spread(whole_layer(name), rank, world_size), rank, length)
    assert got.keys() == expected.keys()
    found = {}
    for key, value in expected.items():
        if key.startswith("experts."):  # the whole layer's experts saw this rank's tokens, the spread ones' all tokens
            dist.all_reduce(value)
            value = value[rank * E // world_size : (rank + 1) * E // world_size]
        error = (got[key] - value).abs().max().item() if value.numel() else 0.0
        found[key] = {"error": error, "size": value.abs().max().item() if value.numel() else 0.0}
    return found


def train(name: str) -> Trace:
    """Two steps with ZeRO-1 at expert parallel 2; ``biases`` holds sums of what ranks share."""
    run = Run(router={"name": name, **IN_A_MODEL.get(name, {})}, steps=2)
    engine, trace = make_engine(run, 2, 1), Trace()
    for step in range(run.steps):
        train_step(run, engine, step, trace)
    shared = [p.detach().double().sum() for p in engine.model.parameters() if not is_expert_parameter(p)]
    shared += [b.detach().double().sum() for b in engine.model.buffers()]
    trace.biases = {"shared": torch.stack(shared)}
    engine.module.destroy()
    return trace


def all_on_one_rank(rank: int, world_size: int) -> dict[Any, Any]:
    warnings.filterwarnings("ignore", message="router .* evaluates")  # groups are tiny here
    found: dict[Any, Any] = {}
    for name in ROUTERS:
        # An error comes on both ranks alike, and is the result; the other routers go on.
        for case, lengths in LENGTHS.items():
            found[name, case] = attempt(
                lambda lengths=lengths, name=name: compare(name, rank, world_size, lengths[rank])
            )
        found[name] = attempt(lambda name=name: train(name))
    return found


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as problem:
        return problem


def of_each_rank(ranks: list[dict[Any, Any]], key: Any) -> list[Any]:
    for found in ranks:
        if isinstance(found[key], Exception):
            raise found[key]
    return [found[key] for found in ranks]


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(all_on_one_rank, 2)


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_spread_layer_is_the_whole_layer(ranks: list[dict[Any, Any]], name: str, case: str) -> None:
    for rank, tensors in enumerate(of_each_rank(ranks, (name, case))):
        assert {"y", "x", "experts.gate_up_proj", "experts.down_proj"} <= tensors.keys()
        for key, numbers in tensors.items():
            assert numbers["error"] <= TOLERANCE * max(numbers["size"], 1e-3), f"rank {rank} {key}: {numbers}"
            if LENGTHS[case][rank] and not key.startswith("experts."):
                assert numbers["size"] > 1e-4, f"rank {rank} {key}: too small to compare"


@pytest.mark.parametrize("name", ROUTERS)
def test_it_trains_through_the_engine(ranks: list[dict[Any, Any]], name: str) -> None:
    """Losses are finite, and what ranks share stays the same on both."""
    first, second = of_each_rank(ranks, name)
    assert all(math.isfinite(value) for value in first.losses + first.norms)
    assert first.losses == second.losses
    assert torch.equal(first.biases["shared"], second.biases["shared"])
    assert first.losses[0] != first.losses[1]
