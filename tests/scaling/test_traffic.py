"""Planned bytes against bytes at the collectives of real two-rank runs, and the ring over nodes."""

import pytest
from helpers.ranks import run_ranks
from measured_runs import Case, count_collectives, rank_parameters, shape

from moe.parallel.exchange.volume import Volume
from moe.scaling.traffic import LinkBytes, plan_traffic, ring, with_recompute

CASES = [Case(ep_size=ep_size, zero_stage=stage, grad_accum=2) for ep_size in (1, 2) for stage in (0, 1, 2, 3)]
WEIGHTS, GRADIENTS = ("_allgather_base_",), ("allreduce_", "_reduce_scatter_base_")


def test_data_parallel_bytes_are_what_deepspeed_sends() -> None:
    for case, counted in zip(CASES, run_ranks(count_collectives, 2, CASES)[0], strict=True):
        traffic = plan_traffic(shape(), case.layout, rank_parameters(case), top_k=2)
        assert traffic.gradients.node == sum(counted.get(name, 0) for name in GRADIENTS), case
        assert traffic.weights.node == sum(counted.get(name, 0) for name in WEIGHTS), case
        assert traffic.gradients.network == traffic.weights.network == 0


def test_zero_3_gathers_again_for_backward_what_did_not_stay() -> None:
    few, many = Case(ep_size=1, zero_stage=3), Case(ep_size=1, zero_stage=3, max_live=1000)
    found = [plan_traffic(shape(), case.layout, rank_parameters(case), top_k=2).weights.node for case in (few, many)]
    assert found[1] == 2 * found[0]


@pytest.mark.parametrize(
    "replicas, per_node, node, network", [(8, 8, 7 / 8, 0), (16, 8, 15 / 16 * 7 / 8, 15 / 16 / 8), (4, 1, 0, 3 / 4)]
)
def test_a_ring_crosses_each_node_once(replicas: int, per_node: int, node: float, network: float) -> None:
    sent = ring(1.0, replicas, per_node)
    assert sent.node == pytest.approx(node)
    assert sent.network == pytest.approx(network)


def test_recompute_sends_the_forward_half_twice() -> None:
    volume = Volume(
        intra={"forward dispatch rows": 3.0, "backward combine rows": 5.0}, inter={"forward combine rows": 7.0}
    )
    assert with_recompute(volume, False) == LinkBytes(node=8.0, network=7.0)
    assert with_recompute(volume, True) == LinkBytes(node=11.0, network=14.0)
