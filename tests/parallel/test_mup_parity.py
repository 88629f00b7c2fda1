"""muP's optimizer groups in every layout: the same run as in plain PyTorch, and the same run after a checkpoint.

Losses of every step, and every parameter at the end, agree to 1e-5 with a learning rate of 1e-3, as in `test_parity`. Groups
differ in rate, decay and eps there, and expert parallelism splits each of them once more. Muon, which DeepSpeed can have at
ZeRO 0 only, makes its updates in bf16, where noise of fp32 now and then becomes a step of 2^-9: 1e-4 for its parameters.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import whole
from helpers.ranks import run_ranks
from tiny_run import B, Layout, Run, build_model, learning_rate, micro_batches
from torch import Tensor, nn

from moe.layer import finish_step, moe_layers
from moe.models import MoEForCausalLM
from moe.parallel import checkpoint
from moe.parallel.checkpoint import CheckpointError
from moe.parallel.engine import Engine
from moe.parallel.state import full_weight, num_optimizer_steps
from moe.scaling.mup import scale_initial
from moe.train.config import OptimConfig
from moe.train.optim import choose_optimizer, param_groups

TOLERANCE = 1e-5
PARAMETER_TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}
RUN = Run(steps=8)
# Of 16, 24, 2 and 8: ratios of 2 and 4.
BASE = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 1, "expert_hidden": 2}
OPTIM = {
    "adamw": OptimConfig(lr=RUN.lr, eps=1e-6, weight_decay=0.1),
    "muon": OptimConfig(name="muon", lr=RUN.lr, eps=1e-6, weight_decay=0.1),
}


@dataclass(frozen=True)
class Case:
    """An optimizer in a layout."""

    optim: str
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.optim}-{self.layout.name}"


CASES = [
    Case(optim, Layout(world_size=2, ep_size=ep_size, zero_stage=stage))
    for optim, ep_size, stage in (
        ("adamw", 2, 0),
        ("adamw", 2, 1),
        ("adamw", 2, 2),
        ("adamw", 2, 3),
        ("adamw", 1, 1),
        ("muon", 2, 0),
        ("muon", 1, 0),
    )
]
SAVED_AT = 4
# Written by the first of each pair at `SAVED_AT`, read by the second.
RESUMED = [
    (CASES[here], CASES[there]) for here, there in ((0, 0), (1, 1), (3, 3), (1, 4), (5, 5), (6, 6), (5, 6), (6, 5))
]
OTHER_OPTIMIZER = [(CASES[0], CASES[5]), (CASES[5], CASES[0])]


@dataclass
class Trace:
    """Losses by step, and whole parameters at the end."""

    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def mup_model(seed: int = 0) -> MoEForCausalLM:
    model = build_model(RUN, seed)
    model.config.mup = BASE
    scale_initial(model)
    return model


def set_rates(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(RUN, step) * group["lr_scale"]


def train_plain(optim: str, **changed: Any) -> Trace:
    """One process, no engine; ``changed`` overrides settings of every group."""
    model, trace = mup_model(), Trace()
    named = dict(model.named_parameters())
    groups = [
        {**group, "params": [named[name] for name in group["params"]], **changed}
        for group in param_groups(model, OPTIM[optim])
    ]
    chosen = choose_optimizer(OPTIM[optim])
    optimizer = chosen.optimizer_class([group for group in groups if group["params"]], **chosen.options)
    for step in range(RUN.steps):
        set_rates(optimizer, step)
        (batch,) = micro_batches(RUN, step, 0, 1)
        loss = model(**batch).loss
        loss.backward()
        trace.losses.append(loss.item())
        nn.utils.clip_grad_norm_(list(named.values()), RUN.clip)
        optimizer.step()
        optimizer.zero_grad()
        finish_step(moe_layers(model).values())
    trace.parameters = {name: parameter.detach().clone() for name, parameter in named.items()}
    return trace


def make_engine(case: Case, model: MoEForCausalLM) -> Engine:
    layout, chosen = case.layout, choose_optimizer(OPTIM[case.optim])
    config = {
        "train_micro_batch_size_per_gpu": B // layout.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": RUN.clip,
        "zero_optimization": layout.zero_optimization,
        "steps_per_print": 2**31,
    }
    groups = param_groups(model, OPTIM[case.optim])
    return Engine(model, groups, chosen.optimizer_class, chosen.options, config, layout.ep_size)


def muon_parameters(engine: Engine) -> list[Tensor]:
    return [parameter for group in engine.optimizer.param_groups if group.get("muon") for parameter in group["params"]]


def train(engine: Engine, steps: range) -> Trace:
    trace, rank, world_size = Trace(), dist.get_rank(), dist.get_world_size()
    for step in steps:
        set_rates(engine.optimizer, step)
        (batch,) = micro_batches(RUN, step, rank, world_size)
        loss = engine.module(**batch).loss
        engine.backward(loss)
        assert engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        trace.losses.append(total.item() / world_size)
        finish_step(moe_layers(engine.model).values())
    assert num_optimizer_steps(engine) == steps.stop
    assert not any("step" in engine.optimizer.state[parameter] for parameter in muon_parameters(engine))
    trace.parameters = {
        name: whole(engine, parameter, full_weight(engine, parameter)) for name, parameter in engine.named_parameters()
    }
    return trace


def train_all(rank: int, world_size: int, root: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in CASES:
        engine = make_engine(case, mup_model())
        before = train(engine, range(SAVED_AT))
        saved = checkpoint.save(root / case.name, SAVED_AT, engine, {}, keep_last=1)
        assert (saved.error, saved.warnings) == (None, [])
        after = train(engine, range(SAVED_AT, RUN.steps))
        found[case] = replace(after, losses=before.losses + after.losses)
        engine.module.destroy()
    for source, target in RESUMED:
        engine = make_engine(target, mup_model(seed=7))
        checkpoint.load(checkpoint.step_dir(root / source.name, SAVED_AT), engine)
        found[source, target] = train(engine, range(SAVED_AT, RUN.steps))
        engine.module.destroy()
    for source, target in OTHER_OPTIMIZER:
        engine = make_engine(target, mup_model(seed=7))
        try:
            checkpoint.load(checkpoint.step_dir(root / source.name, SAVED_AT), engine)
        except CheckpointError as problem:
            found[source, target] = str(problem)
        engine.module.destroy()
    for stage in (1, 2, 3):
        engine = make_engine(Case("muon", Layout(world_size=2, ep_size=2, zero_stage=stage)), mup_model())
        try:
            train(engine, range(1))
        except ValueError as problem:
            found[stage] = str(problem)
        engine.module.destroy()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """By rank."""
    return run_ranks(train_all, 2, tmp_path_factory.mktemp("mup"))


@pytest.fixture(scope="module")
def truths() -> dict[str, Trace]:
    return {optim: train_plain(optim) for optim in OPTIM}


def check_losses(got: Trace, truth: Trace) -> None:
    assert got.losses == pytest.approx(truth.losses, rel=TOLERANCE), "losses"


def check_parameters(got: Trace, truth: Trace, tolerance: float = TOLERANCE) -> None:
    assert got.parameters.keys() == truth.parameters.keys()
    for name, expected in truth.parameters.items():
        error = ((got.parameters[name] - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"parameters: {name} is off by {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_trains_the_same(found: list[dict[Any, Any]], truths: dict[str, Trace], case: Case) -> None:
    for of_rank in found:
        check_losses(of_rank[case], truths[case.optim])
        check_parameters(of_rank[case], truths[case.optim], PARAMETER_TOLERANCE[case.optim])


@pytest.mark.parametrize(("source", "target"), RESUMED, ids=lambda case: case.name)
def test_a_resumed_run_is_the_uninterrupted_one(
    found: list[dict[Any, Any]], truths: dict[str, Trace], source: Case, target: Case
) -> None:
    truth = truths[source.optim]
    for of_rank in found:
        resumed, straight = of_rank[source, target], of_rank[source]
        if source == target:
            assert resumed.losses == straight.losses[SAVED_AT:]
            for name, expected in straight.parameters.items():
                assert torch.equal(resumed.parameters[name], expected), name
        check_losses(resumed, replace(truth, losses=truth.losses[SAVED_AT:]))
        check_parameters(resumed, truth, PARAMETER_TOLERANCE[source.optim])


def test_a_checkpoint_of_another_optimizer_is_refused(found: list[dict[Any, Any]]) -> None:
    to_muon, to_adamw = (found[0][pair] for pair in OTHER_OPTIMIZER)
    assert (
        "it has exp_avg and exp_avg_sq, and this one has exp_avg; resume with the optim.name that wrote it" in to_muon
    )
    assert "it has exp_avg, and this one has exp_avg and exp_avg_sq" in to_adamw


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitioned_matrices_are_what_muon_cannot_step(found: list[dict[Any, Any]], stage: int) -> None:
    """Why the config refuses it there: the optimizer finds flat pieces in its groups."""
    for of_rank in found:
        assert "Muon only supports 2D parameters" in of_rank[stage]


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"lr_scale": 1.0}, check_losses),
        ({"lr_scale": 1.0}, check_parameters),
        ({"weight_decay": 0.1}, check_parameters),
        ({"eps": 1e-6}, check_parameters),
    ],
)
def test_a_wrong_group_is_seen(truths: dict[str, Trace], changed: dict[str, float], check: Any) -> None:
    """Rates, decays and eps of the base for everything: the comparison fails."""
    with pytest.raises(AssertionError, match=r"losses|parameters"):
        check(train_plain("adamw", **changed), truths["adamw"])


def test_muon_without_its_factors_is_seen(truths: dict[str, Trace]) -> None:
    with pytest.raises(AssertionError, match=r"parameters"):
        check_parameters(train_plain("muon", lr_scale=1.0), truths["muon"], PARAMETER_TOLERANCE["muon"])


def test_the_groups_differ(truths: dict[str, Trace]) -> None:
    groups = [group for group in param_groups(mup_model(), OPTIM["adamw"]) if group["params"]]
    assert sorted({group["lr_scale"] for group in groups}) == [0.25, 0.5, 1.0]
    for truth in truths.values():
        assert truth.losses[-1] < truth.losses[0]
