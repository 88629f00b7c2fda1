"""The central promise: however a run is spread, it is the same run.

The truth is a plain PyTorch loop on one process without an engine. Every layout must repeat its loss and gradient norm in
every step, and the gradient of every parameter in the first two (so after one step), to 1e-5; what is seen is 1e-6.

Two things keep the noise of fp32 from growing over 20 steps: a learning rate of 1e-3 after 4 steps of warm-up (with 1e-2
AdamW turns noise in small gradients into visible steps), and routers whose initial weights are wide enough that hardly any
token sits on the border between two experts.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from tiny_run import NUM_EXPERTS, Layout, Run, Trace, train_layout, train_plain

TOLERANCE = 1e-5
BF16_TOLERANCE = 5e-3  # of losses that change by some percent from step to step
BF16_NORM_TOLERANCE = 3e-2
MAIN = Run()
SHORT = replace(MAIN, steps=6)
RUNS = {
    "main": MAIN,
    "short": SHORT,
    "grad_accum": replace(SHORT, grad_accum=2),
    "bias": replace(
        SHORT,
        router={"name": "noaux_tc", "top_k": 2, "num_groups": 4, "top_k_groups": 2},
        balance={"aux_coef": 0.0, "bias_update_rate": 0.01},
    ),
    # without padding: with it, ranks would weigh their sequences by their tokens, and one process would not
    "sequence": replace(SHORT, ragged=False, balance={"aux_coef": 0.1, "aux_scope": "sequence"}),
    "checkpointing": replace(SHORT, checkpointing=True, grad_accum=2),
    "recompute": replace(SHORT, recompute=True, checkpointing=True),
    "gated_gelu": replace(SHORT, moe={"activation": "gelu", "shared_gate": True}),
    "bf16": replace(MAIN, steps=8, bf16=True),
}
# What each deliberate error must show in. AdamW forgives a constant factor, so losses alone would miss doubled gradients.
SABOTAGES = {
    "router_detached": ("gradient", "norm", "loss"),
    "expert_gradients_doubled": ("gradient", "norm"),
    "counts_not_reduced": ("gradient", "norm", "loss"),
}


@dataclass(frozen=True)
class Case:
    """One run in one layout."""

    run: str
    layout: Layout
    sabotage: str | None = None

    @property
    def name(self) -> str:
        return f"{self.run}-{self.layout.name}"


def cases(
    run: str, world_size: int, ep_sizes: tuple[int, ...], zero_stages: tuple[int, ...] = (0, 1, 2, 3), **more: Any
) -> list[Case]:
    return [
        Case(run, Layout(world_size=world_size, ep_size=ep_size, zero_stage=stage, **more))
        for ep_size in ep_sizes
        for stage in zero_stages
    ]


CASES = [
    *cases("main", 1, (1,)),
    *cases("grad_accum", 1, (1,), (2,)),
    *cases("main", 2, (1, 2)),
    *cases("grad_accum", 2, (1,), (2,)),
    *cases("grad_accum", 2, (2,)),
    *cases("bias", 2, (1,), (1,)),
    *cases("bias", 2, (2,)),
    *cases("sequence", 2, (1, 2), (1,)),
    *cases("checkpointing", 2, (1,), (1,)),
    *cases("checkpointing", 2, (2,)),
    *cases("gated_gelu", 2, (2,), (1, 3)),
    *cases("main", 4, (2, 4)),
    *cases("bias", 4, (2,), (1,)),
    *cases("short", 2, (1, 2), sp_size=2),
    *cases("checkpointing", 2, (2,), sp_size=2),
    *cases("recompute", 2, (2,)),
    *cases("short", 4, (2, 4), (1, 3), sp_size=2),
    *cases("short", 2, (1, 2), (1, 2, 3), offload="optimizer"),
    *cases("short", 2, (1, 2), (3,), offload="optimizer param"),
    *cases("checkpointing", 2, (2,), (3,), sp_size=2, offload="optimizer param"),
]
BF16_CASES = cases("bf16", 2, (1, 2))
SABOTAGE_CASES = [Case("main", Layout(world_size=2, ep_size=2, zero_stage=1), sabotage) for sabotage in SABOTAGES]


def train_all(rank: int, world_size: int, wanted: list[Case]) -> dict[Case, Trace]:
    found = {}
    for case in wanted:
        run = RUNS[case.run]
        if case.sabotage is not None:
            run = replace(run, steps=2, sabotage=case.sabotage)
        found[case] = train_layout(run, case.layout)
    return found


Traces = dict[Case, list[Trace]]


@functools.cache
def traces_of(world_size: int) -> Traces | Exception:
    """All cases of a world size: the traces of their ranks; or why there are none, so that it is tried only once."""
    wanted = [case for case in CASES + BF16_CASES + SABOTAGE_CASES if case.layout.world_size == world_size]
    try:
        by_rank = run_ranks(train_all, world_size, wanted, timeout=480)
    except Exception as problem:
        return problem
    return {case: [traces[case] for traces in by_rank] for case in wanted}


@pytest.fixture
def traces(case: Case) -> list[Trace]:
    """Of the ranks of a case."""
    found = traces_of(case.layout.world_size)
    if isinstance(found, Exception):
        raise found
    return found[case]


@pytest.fixture(scope="module")
def truths() -> dict[str, Trace]:
    return {name: train_plain(replace(run, bf16=False)) for name, run in RUNS.items()}


def each(wanted: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", wanted, ids=[case.sabotage or case.name for case in wanted])


def check_numbers(what: str, got: list[float], truth: list[float], tolerance: float) -> None:
    assert len(got) == len(truth)
    for step, (value, expected) in enumerate(zip(got, truth, strict=True)):
        assert abs(value - expected) <= tolerance * abs(expected), f"{what} of step {step}: {value}, not {expected}"


def check_gradients(trace: Trace, truth: Trace) -> None:
    for step, expected in enumerate(truth.gradients):
        assert trace.gradients[step].keys() == expected.keys()
        for name, whole in expected.items():
            mine = whole[trace.expert_slice] if ".mlp.experts." in name else whole
            got = trace.gradients[step][name]
            assert got.shape == mine.shape, name
            assert mine.norm() > 1e-4, f"{name}: too small a gradient to compare"
            error = ((got - mine).norm() / mine.norm()).item()
            assert error <= TOLERANCE, f"gradient of {name} in step {step}: relative error {error:.1e}"


def check_same(traces: list[Trace], truth: Trace) -> None:
    assert len({trace.expert_slice.start for trace in traces}) * traces[0].num_local_experts == NUM_EXPERTS
    for trace in traces:
        check_gradients(trace, truth)
        check_numbers("loss", trace.losses, truth.losses, TOLERANCE)
        check_numbers("gradient norm", trace.norms, truth.norms, TOLERANCE)
        assert trace.biases.keys() == truth.biases.keys()


@each(CASES)
def test_every_layout_is_the_same_run(traces: list[Trace], truths: dict[str, Trace], case: Case) -> None:
    truth = truths[case.run]
    check_same(traces, truth)
    for trace in traces:
        for name, bias_E in truth.biases.items():
            assert torch.equal(trace.biases[name], bias_E), name


@each(SABOTAGE_CASES)
def test_a_broken_layout_fails(traces: list[Trace], truths: dict[str, Trace], case: Case) -> None:
    """The comparison sees routers or experts with wrong gradients, and balance losses of one rank's counts."""
    truth = truths[case.run]
    assert case.sabotage is not None
    checks = {
        "gradient": lambda: check_gradients(traces[0], truth),
        "norm": lambda: check_numbers("norm", traces[0].norms, truth.norms[:2], TOLERANCE),
        "loss": lambda: check_numbers("loss", traces[0].losses, truth.losses[:2], TOLERANCE),
    }
    for what in SABOTAGES[case.sabotage]:
        with pytest.raises(AssertionError, match=what):
            checks[what]()


def test_the_reference_says_something(truths: dict[str, Trace]) -> None:
    """Clipping, weight decay, balance losses and the bias all act, so a layout that misses one of them is seen."""
    main = truths["main"]
    assert min(norm for truth in truths.values() for norm in truth.norms) > 1.5 * MAIN.clip
    assert main.losses[-1] < main.losses[0]
    for changed in (replace(SHORT, clip=1e9), replace(SHORT, balance={"aux_coef": 0.1}), replace(SHORT, lr=1.01e-3)):
        with pytest.raises(AssertionError, match="loss"):
            check_numbers("loss", train_plain(changed).losses, main.losses[: SHORT.steps], TOLERANCE)
    assert truths["bias"].biases
    for bias_E in truths["bias"].biases.values():
        assert bias_E.abs().max() >= 0.03


def test_activation_checkpointing_is_exact(truths: dict[str, Trace]) -> None:
    plain, recomputed = truths["grad_accum"], truths["checkpointing"]
    assert recomputed.losses == plain.losses
    assert recomputed.norms == plain.norms


@each(BF16_CASES)
def test_bf16_follows_fp32(traces: list[Trace], truths: dict[str, Trace], case: Case) -> None:
    for trace in traces:
        check_numbers("loss", trace.losses, truths["bf16"].losses, BF16_TOLERANCE)
        check_numbers("gradient norm", trace.norms, truths["bf16"].norms, BF16_NORM_TOLERANCE)
        assert trace.losses == traces[0].losses
        assert trace.norms == traces[0].norms
    assert traces[0].losses != truths["bf16"].losses
