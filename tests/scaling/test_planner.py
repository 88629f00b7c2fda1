"""The search: what it tries, what it extrapolates, how it ranks, and what it says when nothing fits."""

from dataclasses import replace

import pytest
from measured_runs import optimizer_groups, shape

from moe.scaling.dry_run import step_bytes
from moe.scaling.hardware import HARDWARE, Hardware
from moe.scaling.planner import Planner, Search, overrides
from moe.scaling.shape import Layout

H100 = HARDWARE["h100"]
BASE = Layout(world_size=8, precision="bf16", gpus_per_node=4, zero={"reduce_bucket_size": 10**5})


def planner(hardware: Hardware = H100, batch_size: int = 32, base: Layout = BASE) -> Planner:
    return Planner(shape(), hardware, base, batch_size, optimizer_groups)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_straight_line_meets_a_dry_run_of_the_whole_model(recompute: bool) -> None:
    layout = Layout(world_size=2, ep_size=2, micro_batch_size=5, activation_checkpointing=recompute)
    whole, line = step_bytes(shape(), layout), planner(base=layout).step_bytes(layout)
    # not exactly: another number of tokens is another random routing
    assert line.saved == pytest.approx(whole.saved, rel=0.03)
    assert line.peak == pytest.approx(whole.peak, rel=0.03)
    assert line.later_peak == pytest.approx(whole.later_peak, rel=0.03)


def test_search_tries_what_divides_and_ranks_what_fits() -> None:
    search = Search(zero_stages=(1, 3), micro_batch_sizes=(1, 4), ep_sizes=(1, 8))
    found = planner().search(search)
    assert len(found) == 2 * 2 * 2 * 2
    assert all(candidate.fits for candidate in found)
    times = [candidate.time.total for candidate in found]
    assert times == sorted(times)
    assert {candidate.layout.grad_accum for candidate in found} == {4, 1}
    middle = sorted(candidate.memory.peak for candidate in found)[len(found) // 2]
    tight = planner(replace(H100, memory_bytes=middle, reserved_bytes=0)).search(search)
    fitting = [candidate for candidate in tight if candidate.fits]
    assert tight[: len(fitting)] == fitting and 0 < len(fitting) < len(tight)
    assert all(candidate.memory.peak <= middle for candidate in fitting)
    assert all(candidate.memory.peak > middle for candidate in tight[len(fitting) :])


def test_batch_must_divide() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=30 is not divisible by 8 GPUs; make it a multiple of 8"):
        planner(batch_size=30).layouts(Search())
    with pytest.raises(ValueError, match="micro_batch_size must divide the 4 sequences"):
        planner().layouts(Search(micro_batch_sizes=(3,)))


def test_predictions_follow_the_assumptions() -> None:
    layout = replace(BASE, ep_size=8, zero_stage=1, micro_batch_size=4)
    base = planner().plan(layout).time
    slow_network = planner(replace(H100, network_bandwidth=H100.network_bandwidth / 2)).plan(layout).time
    assert slow_network.exchange > base.exchange and slow_network.data_parallel > base.data_parallel
    assert slow_network.dense == base.dense
    hidden = planner(replace(H100, exchange_overlap=1.0)).plan(layout).time
    assert hidden.exchange == 0
    skewed = planner().plan(layout, imbalance=2.0).time
    assert skewed.experts == pytest.approx(2 * base.experts)
    recomputed = planner().plan(replace(layout, activation_checkpointing=True))
    assert recomputed.time.total > base.total
    assert recomputed.memory.activations < planner().plan(layout).memory.activations
    assert base.mfu == pytest.approx(base.tokens_per_second * planner().flops.total / H100.flops)


def test_flops_count_the_active_parameters() -> None:
    flops, owned = planner().flops, planner().owned(1)
    parts = owned.by_part()
    lookup = 512 * 128
    assert flops.expert == parts["routed experts"] * 2 / 8
    assert flops.dense == owned.total - parts["routed experts"] - parts["norm"] - lookup
    assert flops.total == 6 * (flops.dense + flops.expert) + 12 * 4 * 128 * 64


def test_owned_parameters_add_up_over_an_expert_group() -> None:
    whole, part = planner().owned(1), planner().owned(4)
    assert part.total == whole.total == whole.numel
    assert part.by_part()["routed experts"] * 4 == whole.by_part()["routed experts"]
    assert {name: n for name, n in part.by_part().items() if name != "routed experts"} == {
        name: n for name, n in whole.by_part().items() if name != "routed experts"
    }


def test_overrides_can_be_pasted() -> None:
    layout = replace(BASE, ep_size=4, zero_stage=2, micro_batch_size=8, activation_checkpointing=True)
    assert overrides(layout) == [
        "parallel.ep_size=4",
        "parallel.zero_stage=2",
        "train.micro_batch_size=8",
        "train.activation_checkpointing=true",
    ]
