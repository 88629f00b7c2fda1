"""Planned bytes against bytes that real two-rank runs hold."""

import pytest
from helpers.ranks import run_ranks
from measured_runs import Case, measure, plan

from moe.scaling.memory import engine_bytes
from moe.scaling.shape import Layout, OwnedParameter, OwnedParameters

TOLERANCE = 0.10
# Of the bytes that are live at the peak: below that, a part's own error is nothing to anybody.
NEGLIGIBLE = 0.02
PARTS = ("weights", "optimizer", "gradients", "activations", "exchange", "peak")

FEW = [
    Case(ep_size=2, zero_stage=0),
    Case(ep_size=1, zero_stage=1, precision="fp32"),
    Case(ep_size=2, zero_stage=2, grad_accum=2, recompute=True),
    Case(ep_size=2, zero_stage=3, micro_batch_size=4),
]
MANY = [
    Case(
        ep_size=ep_size, zero_stage=stage, precision=precision, micro_batch_size=size, grad_accum=accum, recompute=again
    )
    for ep_size in (1, 2)
    for stage in (0, 1, 2, 3)
    for precision, size, accum, again in (("fp32", 1, 1, False), ("bf16", 4, 1, True), ("bf16", 2, 2, False))
]


def check(cases: list[Case]) -> None:
    problems = []
    for case, measured in zip(cases, run_ranks(measure, 2, cases, timeout=500)[0], strict=True):
        planned = plan(case)
        for part in PARTS:
            got, expected = getattr(planned, part), getattr(measured, part)
            if abs(got - expected) > max(TOLERANCE * expected, NEGLIGIBLE * measured.peak):
                problems.append(f"{case}: {part} planned {got}, measured {expected} of {measured.peak}")
    assert not problems, "\n".join(problems)


def test_plans_are_what_is_measured() -> None:
    check(FEW)


@pytest.mark.slow
def test_plans_are_what_is_measured_in_all_layouts() -> None:
    check(MANY)


def owned(*numels: int, experts: int = 0) -> OwnedParameters:
    dense = tuple(
        OwnedParameter(name=f"p{i}", numel=n, part="attention", is_expert=False) for i, n in enumerate(numels)
    )
    groups = [dense]
    if experts:
        groups.append((OwnedParameter(name="e", numel=experts, part="routed experts", is_expert=True),))
    return OwnedParameters(groups=tuple(groups), total=0)


def test_zero_shares_experts_among_their_replicas_only() -> None:
    layout = Layout(world_size=8, ep_size=4, zero_stage=1, zero={"reduce_bucket_size": 10})
    found = engine_bytes(owned(800, experts=400), layout)
    assert found.weights == 2 * 1200
    assert found.optimizer == 12 * (800 // 8 + 400 // 2)
    assert found.bucket == 20


def test_shares_are_padded_to_the_alignment() -> None:
    found = engine_bytes(owned(5, 4), Layout(world_size=4, zero_stage=2, precision="fp32"))
    assert found.weights == 4 * 16  # 9 up to a multiple of 2 * 4
    assert found.optimizer == 12 * 4


@pytest.mark.parametrize("rank, overlapping", [(0, 60), (1, 60), (2, 40), (3, 40 + 20)])
def test_gradients_are_kept_of_all_parameters_that_overlap_the_share(rank: int, overlapping: int) -> None:
    # parameters of 60, 40 and 20 in four shares of 30 (which 2 * 4 divides)
    found = engine_bytes(owned(60, 40, 20), Layout(world_size=4, zero_stage=2, precision="fp32"), rank)
    assert found.held_after == 4 * overlapping


def test_the_largest_share_is_planned_for() -> None:
    layout = Layout(world_size=4, zero_stage=2, precision="fp32")
    worst = engine_bytes(owned(60, 40, 20), layout).held_after
    assert worst == max(engine_bytes(owned(60, 40, 20), layout, rank).held_after for rank in range(4))


def test_zero_3_keeps_small_parameters_whole() -> None:
    zero = {"reduce_bucket_size": 10, "stage3_param_persistence_threshold": 50, "stage3_max_live_parameters": 0}
    found = engine_bytes(owned(100, 50), Layout(world_size=2, zero_stage=3, zero=zero))
    assert found.weights == 2 * (50 + 25 + 50)
    assert found.gathered == 2 * 100
    assert found.optimizer == 12 * 75
