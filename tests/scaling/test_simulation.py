"""The real code as single ranks of jobs that do not exist: groups, ownership, shapes, and bytes against the plan."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from measured_runs import optimizer_groups
from measured_runs import shape as small_shape
from torch import Tensor

from moe.layer import MoESpec, moe_layers
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.volume import exchange_bytes
from moe.parallel.simulated import Transfer, simulated_ranks
from moe.scaling.dry_run import simulated_model, step_bytes
from moe.scaling.shape import DTYPES, Layout, ModelShape, decoder_config, owned_parameters
from moe.train.config import load_config
from moe.train.plan import model_shape
from moe.types import Routing

WORLD, EP = 512, 64
RECIPE = Path(__file__).parents[2] / "configs" / "deepseek-v3.yaml"


@pytest.fixture(scope="module")
def deepseek() -> ModelShape:
    return model_shape(load_config(RECIPE))


def expert_groups() -> tuple[list[list[int]], list[list[int]]]:
    """Expert-parallel and expert-data-parallel group of this rank."""
    from deepspeed.utils import groups

    name = f"ep_size_{EP}"
    found = (groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name))
    return tuple(sorted(dist.get_process_group_ranks(group)) for group in found)  # type: ignore[return-value]


def check_rank(shape: ModelShape, rank: int) -> tuple[int, set[int], set[int]]:
    """What holds for each rank; its first expert, and the two groups."""
    assert shape.moe is not None
    per_rank, dim, width = shape.moe.num_experts // EP, shape.decoder.hidden_size, shape.moe.expert_hidden
    with simulated_model(shape, Layout(world_size=WORLD, ep_size=EP), rank) as (model, _):
        layers = list(moe_layers(model).values())
        assert len(layers) == shape.num_moe_layers
        for layer in layers:
            assert layer.experts.gate_up_proj.shape == (per_rank, 2 * width, dim)
            assert layer.experts.down_proj.shape == (per_rank, dim, width)
            assert layer.router.weight.shape == (shape.moe.num_experts, dim)
            assert layer.ep_rank == rank % EP
        experts, replicas = expert_groups()
        return layers[0].ep_rank * per_rank, set(experts), set(replicas)


def test_every_expert_lives_once_in_each_expert_group(deepseek: ModelShape) -> None:
    shape = deepseek.with_layers(1, 1)
    group = range(3 * EP, 4 * EP)
    found = {rank: check_rank(shape, rank) for rank in (*group[:2], group[37], group[-1], 5, WORLD - 1)}
    for rank, (first, experts, replicas) in found.items():
        start = rank // EP * EP
        assert experts == set(range(start, start + EP))
        assert replicas == set(range(rank % EP, WORLD, EP))
        assert first == (rank - start) * 4


def test_published_number_of_parameters(deepseek: ModelShape) -> None:
    layout = Layout(world_size=EP, ep_size=EP)
    with simulated_model(deepseek, layout) as (model, _):
        owned = owned_parameters(model, optimizer_groups(model), total=0)
    parts = owned.by_part()
    experts = parts.pop("routed experts")
    assert experts == 58 * 4 * 3 * 7168 * 2048
    total, active = sum(parts.values()) + EP * experts, sum(parts.values()) + 8 / 256 * EP * experts
    assert round(total / 1e9) == 671  # deepseek-ai/DeepSeek-V3, README_WEIGHTS.md: 671B without the prediction module
    # There 36.7B "including 0.9B for Embedding and 0.9B for the output Head"; it is so with one of the two.
    assert (active - parts["embedding"] / 2) / 1e9 == pytest.approx(36.7, abs=0.1)


def random_ids(num_experts: int, top_k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.rand(num_experts, generator=generator).square() + 0.01  # uneven
    return torch.multinomial(popularity_E.expand(96, -1), top_k, generator=generator)


def bytes_by_link(transfers: tuple[Transfer, ...], rank: int, node_size: int) -> tuple[int, int]:
    within = between = 0
    for transfer in transfers:
        if transfer.op != "all_to_all":
            continue
        for peer, size in zip(transfer.ranks, transfer.bytes_to, strict=True):
            if peer != rank:
                same = peer // node_size == rank // node_size
                within, between = within + size * same, between + size * (not same)
    return within, between


@pytest.mark.parametrize("hierarchical", ["off", "auto"])
def test_planned_bytes_are_those_of_the_real_exchange(hierarchical: str) -> None:
    ranks, per_node, dim, top_k = 8, 4, 32, 3
    exchange = ExchangeConfig(hierarchical=hierarchical, overlap_chunks=2)  # type: ignore[arg-type]
    layout = Layout(
        world_size=2 * ranks, ep_size=ranks, precision="bf16", gpus_per_node=per_node, exchange=exchange,
        micro_batch_size=2,
    )  # fmt: skip
    decoder = decoder_config({**small_shape().decoder.to_dict(), "hidden_size": dim, "num_hidden_layers": 1})
    spec = MoESpec(num_experts=16, expert_hidden=8, router={"name": "topk", "top_k": top_k})
    shape = ModelShape(decoder=decoder, moe=spec, seq_len=48)
    ids_TK = random_ids(16, top_k, seed=1)
    routing = Routing(
        num_tokens=96,
        num_experts=16,
        token_ids_N=torch.arange(96).repeat_interleave(top_k),
        expert_ids_N=ids_TK.flatten(),
        weights_N=torch.empty(0),
        counts_E=torch.empty(0),
    )
    counted, planned = [0, 0], [0.0, 0.0]
    for rank in range(ranks):
        step = step_bytes(shape, layout, lambda layer, num_tokens: ids_TK, rank)
        within, between = bytes_by_link(step.transfers, rank, per_node)
        volume = exchange_bytes(routing, rank, ranks, dim, DTYPES["bf16"], layout.resolved_exchange, node_size=per_node)
        counted = [counted[0] + within, counted[1] + between]
        planned = [planned[0] + sum(volume.intra.values()), planned[1] + sum(volume.inter.values())]
    assert counted == planned
    assert min(counted) > 0


def test_the_mirror_keeps_counts_and_sums() -> None:
    with simulated_ranks(3, 8) as ranks:
        assert dist.get_rank() == 3 and dist.get_world_size() == 8
        assert all_reduce_sum(torch.tensor([2.0])).tolist() == [16.0]
        sent, received = torch.arange(8), torch.empty(8, dtype=torch.int64)
        dist.all_to_all_single(received, sent)
        assert received.tolist() == [3] * 8
        rows, sizes = torch.empty(36, 2, device="meta"), [1, 2, 3, 4, 5, 6, 7, 8]
        dist.all_to_all_single(torch.empty(32, 2, device="meta"), rows, [4] * 8, sizes)
        assert [(t.op, sum(t.bytes_to)) for t in ranks.transfers[:2]] == [("allreduce", 4), ("all_to_all", 64)]
        assert ranks.transfers[2].bytes_to == tuple(8 * size for size in sizes)
    assert not dist.is_initialized()


def test_a_process_in_a_group_cannot_simulate() -> None:
    with simulated_ranks(0, 2), pytest.raises(ValueError, match="no process group"), simulated_ranks(0, 2):
        pass


def test_routers_without_fixed_k_are_refused() -> None:
    spec = MoESpec(num_experts=4, expert_hidden=8, router={"name": "relu"})
    shape = ModelShape(decoder=small_shape().decoder, moe=spec, seq_len=16)
    with pytest.raises(ValueError, match=r"moe\.router\.name=relu cannot be planned"):
        step_bytes(shape, Layout(world_size=1))


@pytest.mark.slow
def test_the_whole_of_deepseek_v3_runs_as_one_rank_of_512(deepseek: ModelShape) -> None:
    layout = Layout(world_size=WORLD, ep_size=EP, activation_checkpointing=True)
    step = step_bytes(deepseek, layout, rank=130)
    exchanges = [transfer for transfer in step.transfers if transfer.op == "all_to_all"]
    assert len({transfer.ranks for transfer in exchanges}) == 2  # between nodes, and within this one
    assert all(130 in transfer.ranks for transfer in exchanges)
    small = [step_bytes(deepseek.with_layers(3, number), layout, rank=130).saved for number in (1, 2)]
    # a straight line through two small models meets the whole one
    assert step.saved == pytest.approx(small[0] + 57 * (small[1] - small[0]), rel=0.01)
