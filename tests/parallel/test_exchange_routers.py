"""Every router on 4 ranks, with every option of the exchange that is exact: the same output, the same gradients.

Each rank runs the whole layer and the spread ones on its own tokens, with the same random state; ranks have unequal numbers
of tokens, one has none.

Legend: B sequences, L length, D model, E experts.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.layer_oracle import make_layer
from helpers.ranks import run_ranks
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.routers import ROUTERS
from moe.routers.balance import BalanceConfig

D, F, E, B = 6, 5, 8, 4
LENGTHS = (3, 5, 0, 2)  # of each rank's sequences
TOLERANCE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"overlap_chunks": 3},
    "nodes": {"hierarchical": 2},
    "nodes_chunks": {"hierarchical": 2, "overlap_chunks": 2},
    "plain": {"dedup": False},
}


def whole_layer(name: str) -> MoELayer:
    torch.manual_seed(3)
    balance = BalanceConfig(aux_coef=0.1, z_coef=0.1)
    layer = make_layer(D, num_experts=E, expert_hidden=F, router={"name": name}, balance=balance, num_shared_experts=1)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            if parameter.dim() > 1:
                parameter.normal_()  # some start at zero, where all experts tie
    return layer


def spread_layer(name: str, rank: int, world_size: int, config: ExchangeConfig) -> MoELayer:
    layer, num_local = whole_layer(name), E // world_size
    for key, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, key, nn.Parameter(weight.detach()[rank * num_local : (rank + 1) * num_local].clone()))
    layer.exchange = ExpertParallelExchange(dist.group.WORLD, rank, world_size, config)
    return layer


def results(layer: MoELayer, rank: int) -> dict[str, Tensor]:
    """Output and gradients; a parameter without one has none in any layer."""
    torch.manual_seed(10 + rank)
    x_BLD, dy_BLD = torch.randn(2, B, LENGTHS[rank], D)
    layer.context.input_ids_T = torch.randint(1000, (B * LENGTHS[rank],))
    x_BLD.requires_grad_()
    torch.manual_seed(20 + rank)
    y_BLD = layer(x_BLD)
    y_BLD.backward(dy_BLD)
    assert x_BLD.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, **gradients}


def all_on_one_rank(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """Largest difference of each tensor of the spread layer from the whole one's, and the size of that."""
    warnings.filterwarnings("ignore", message="router .* evaluates")  # groups are tiny here
    found = {}
    for name in ROUTERS:
        expected = results(whole_layer(name), rank)
        for key, value in expected.items():
            if key.startswith("experts."):  # of all ranks' tokens
                dist.all_reduce(value)
                expected[key] = value[rank * E // world_size : (rank + 1) * E // world_size]
        for option, options in OPTIONS.items():
            got = results(spread_layer(name, rank, world_size, ExchangeConfig(**options)), rank)
            assert got.keys() == expected.keys()
            found[name, option] = {
                key: ((got[key] - value).abs().max().item(), value.abs().max().item())
                for key, value in expected.items()
                if value.numel()
            }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(all_on_one_rank, 4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_spread_layer_is_the_whole_layer(ranks: list[dict[Any, Any]], name: str, option: str) -> None:
    for rank, found in enumerate(ranks):
        tensors = found[name, option]
        assert {"experts.gate_up_proj", "experts.down_proj", "shared_experts.down_proj.weight"} <= tensors.keys()
        assert ("y" in tensors) == (LENGTHS[rank] > 0)
        for key, (error, size) in tensors.items():
            assert error <= TOLERANCE * max(size, 1e-3), f"rank {rank} {key}: error {error:.1e} of {size:.1e}"
