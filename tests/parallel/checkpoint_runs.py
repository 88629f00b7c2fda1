"""What ranks do for `test_checkpoint`: write, read, fail to write; and which runs and layouts are written and read."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_run import Layout, Run, Trace, build_model, make_engine, micro_batches, train_step
from torch import Tensor, nn

from moe.parallel import checkpoint
from moe.parallel.checkpoint import CheckpointError, Saver, saving
from moe.parallel.engine import Engine, is_expert_parameter
from moe.parallel.state import MOMENTS, full_moment, full_weight, link_moments, num_optimizer_steps

SAVED_AT, STEPS_AFTER = 3, 2
PLAIN = Run(router={"name": "noaux_tc", "top_k": 2}, balance={"aux_coef": 0.05, "bias_update_rate": 0.01})
RUNS = {
    "plain": PLAIN,
    "noisy": replace(PLAIN, router={**PLAIN.router, "jitter": 0.1}),  # the next losses depend on the random state
    "bf16": replace(PLAIN, bf16=True),
}


@dataclass(frozen=True)
class Source:
    """A run that is saved, and where its checkpoint lies."""

    run: str
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.run}-{self.layout.name}"


def layout(world_size: int, ep_size: int, zero_stage: int) -> Layout:
    return Layout(world_size=world_size, ep_size=ep_size, zero_stage=zero_stage)


ONE = [Source("plain", layout(1, 1, stage)) for stage in (1, 3)]
TWO = [
    *(
        Source("plain", layout(2, ep_size, stage))
        for ep_size, stage in ((1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))
    ),
    Source("noisy", layout(2, 2, 1)),
    *(Source("bf16", layout(2, 2, stage)) for stage in (0, 1, 3)),
]
SAME = [(source, source.layout) for source in ONE + TWO]
OTHER = [
    (ONE[0], layout(2, 2, 1)),
    (ONE[1], layout(2, 2, 3)),
    (ONE[0], layout(2, 1, 0)),
    (ONE[0], layout(1, 1, 3)),
    (ONE[1], layout(1, 1, 0)),
    (TWO[3], layout(2, 1, 1)),
    (TWO[3], layout(2, 2, 3)),
    (TWO[5], layout(2, 2, 0)),
    (TWO[1], layout(2, 2, 2)),
    (TWO[2], layout(2, 1, 3)),
    (TWO[3], layout(1, 1, 1)),
    (TWO[5], layout(1, 1, 3)),
    (TWO[2], layout(1, 1, 0)),
]


@dataclass
class State:
    """Whole tensors by kind and name, the same on all ranks; and what comes next: random numbers, losses, logits.

    ``trainer`` is what `checkpoint.load` returned.
    """

    tensors: dict[str, Tensor]
    random: Tensor
    losses: list[float]
    logits: Tensor
    trainer: dict[str, Any] = field(default_factory=dict)


def whole(engine: Engine, parameter: nn.Parameter, local: Tensor) -> Tensor:
    if not is_expert_parameter(parameter):
        return local.clone()
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, local.clone())
    return torch.cat(pieces[: engine.ep_size])


def whole_tensors(engine: Engine) -> dict[str, Tensor]:
    link_moments(engine)
    found = {f"optimizer_steps/{num_optimizer_steps(engine)}": torch.zeros(())}
    for name, parameter in engine.named_parameters():
        found[f"weight/{name}"] = whole(engine, parameter, full_weight(engine, parameter))
        for key in MOMENTS:
            found[f"{key}/{name}"] = whole(engine, parameter, full_moment(engine, parameter, key))
    found |= {f"buffer/{name}": b.clone() for name, b in engine.model.named_buffers() if name.endswith("bias_E")}
    return found


@torch.no_grad()
def logits_of(engine: Engine) -> Tensor:
    engine.module.eval()
    batch = micro_batches(PLAIN, 99, 0, 1)[0]  # the same on all ranks
    logits = engine.module(input_ids=batch["input_ids"]).logits.float()
    engine.module.train()
    return logits


def observe(run: Run, engine: Engine) -> State:
    tensors, logits = whole_tensors(engine), logits_of(engine)
    random_state = torch.get_rng_state()
    random = torch.rand(3)
    torch.set_rng_state(random_state)
    trace = Trace()
    for step in range(SAVED_AT, SAVED_AT + STEPS_AFTER):
        train_step(run, engine, step, trace)
    return State(tensors=tensors, random=random, losses=trace.losses, logits=logits)


def trainer_state(source: Source) -> dict[str, Any]:
    """What an export needs is in it."""
    config = build_model(RUNS[source.run]).config
    return {"note": source.name, "model_config": {"model_type": config.model_type, **config.to_diff_dict()}}


def write(root: Path, source: Source) -> State:
    run = RUNS[source.run]
    layout = source.layout
    engine = make_engine(run, layout.ep_size, layout.zero_stage, zero_optimization=layout.zero_optimization)
    trainer = trainer_state(source)
    torch.manual_seed(100 + dist.get_rank())
    for step in range(SAVED_AT):
        train_step(run, engine, step, Trace())
    saved = checkpoint.save(root / source.name, SAVED_AT, engine, trainer, keep_last=1)
    assert (saved.error, saved.warnings) == (None, [])
    assert saved.path == checkpoint.step_dir(root / source.name, SAVED_AT)
    state = observe(run, engine)
    engine.module.destroy()
    return state


def read(root: Path, source: Source, target: Layout) -> State:
    run = RUNS[source.run]
    model = build_model(run, seed=7)
    engine = make_engine(run, target.ep_size, target.zero_stage, model, target.zero_optimization)
    torch.manual_seed(500 + dist.get_rank())
    trainer = checkpoint.load(checkpoint.step_dir(root / source.name, SAVED_AT), engine)
    observed = replace(observe(run, engine), trainer=trainer)
    engine.module.destroy()
    return observed


def work(rank: int, world_size: int, root: Path, sources: list[Source], disk: Path | None) -> dict[Any, Any]:
    """Write ``sources``, read whatever this world size reads of what exists by then; on two ranks, have writes fail."""
    found: dict[Any, Any] = {source: write(root, source) for source in sources}
    for source, target in SAME + OTHER:
        if target.world_size == world_size and (root / source.name).exists():
            found[source, target] = read(root, source, target)
    if world_size == 2:
        found["failures"] = failing_writes(root / "failures", rank)
        found["other_model"] = read_other_models(root)
        found["disk"] = None if disk is None else fill_disk(disk)
        found["before_first_step"] = save_before_first_step(root / "early")
    return found


def names_in(root: Path) -> list[str]:
    dist.barrier()
    names = sorted(path.name for path in root.iterdir())
    dist.barrier()
    return names


def failing_writes(root: Path, rank: int) -> dict[str, Any]:
    def half_a_file(path: Path, *_: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    engine, trace, found = make_engine(PLAIN, 2, 1), Trace(), {}

    def step_and_save(step: int, keep_last: int = 3) -> dict[str, Any]:
        train_step(PLAIN, engine, step, trace)
        saved = checkpoint.save(root, step, engine, {}, keep_last)
        newest, problems = checkpoint.newest_valid(root)
        return {"error": saved.error, "names": names_in(root), "newest": newest and newest.name, "problems": problems}

    found["good"] = step_and_save(1)
    with mock.patch.object(saving, "write_tensors", half_a_file) if rank == 1 else no_patch():
        found["rank_1_full"] = step_and_save(2)
    with mock.patch.object(saving, "write_bytes", no_room) if rank == 0 else no_patch():
        found["rank_0_full"] = step_and_save(3)
    with mock.patch.object(Saver, "_commit", side_effect=OSError(errno.EIO, "I/O error")):
        found["commit"] = step_and_save(4)
    found["recovered"] = step_and_save(5)
    found["third"] = step_and_save(6)
    found["keep_2"] = step_and_save(7, keep_last=2)
    for step in (3, 8):  # left by killed runs, with a rank that no longer exists
        (root / f".partial-step-{step:08d}").mkdir(exist_ok=True)
        (root / f".partial-step-{step:08d}" / "rank-0005.safetensors").write_bytes(b"old")
    dist.barrier()
    found["after_a_kill"] = step_and_save(8, keep_last=1)
    found["files"] = names_in(root / "step-00000008")
    found["again"] = checkpoint.save(root, 8, engine, {}, keep_last=1)
    engine.module.destroy()
    return found


@contextmanager
def no_patch() -> Iterator[None]:
    yield


def read_other_models(root: Path) -> dict[str, str]:
    found = {}
    path = checkpoint.step_dir(root / TWO[3].name, SAVED_AT)
    for key, run in {
        "wider": replace(PLAIN, moe={"expert_hidden": 12}),
        "fewer": replace(PLAIN, moe={"num_experts": 4}),
        "denser": replace(PLAIN, moe={"first_dense_layers": 2}),
    }.items():
        engine = make_engine(run, 2, 1)
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        try:
            checkpoint.load(path, engine)
        except CheckpointError as problem:
            found[key] = str(problem)
        assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
        engine.module.destroy()
    return found


def fill_disk(disk: Path) -> dict[str, Any]:
    """Save, leave too little room for another one, try to save, make room, save."""
    engine, rank, found = make_engine(PLAIN, 2, 1), dist.get_rank(), {}
    train_step(PLAIN, engine, 0, Trace())
    found["first"] = checkpoint.save(disk, 1, engine, {}, keep_last=1).error
    size = sum(file.stat().st_size for file in (disk / "step-00000001").iterdir())
    if rank == 0:
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(shutil.disk_usage(disk).free - size // 3))
    dist.barrier()
    found["full"] = checkpoint.save(disk, 2, engine, {}, keep_last=1).error
    newest, problems = checkpoint.newest_valid(disk)
    found["newest"], found["problems"], found["names"] = newest and newest.name, problems, names_in(disk)
    if rank == 0:
        (disk / "filler").unlink()
    dist.barrier()
    found["room"] = checkpoint.save(disk, 3, engine, {}, keep_last=1).error
    found["names_after"] = names_in(disk)
    engine.module.destroy()
    return found


def save_before_first_step(root: Path) -> dict[str, list[float]]:
    """A checkpoint without moments."""
    found = {}
    for stage in (1, 3):
        engine = make_engine(PLAIN, 2, stage)
        assert checkpoint.save(root, stage, engine, {}, keep_last=9).error is None
        engine.module.destroy()
        engine, trace = make_engine(PLAIN, 2, stage, build_model(PLAIN, seed=7)), Trace()
        assert checkpoint.load(checkpoint.step_dir(root, stage), engine)["optimizer_steps"] == 0
        for step in range(2):
            train_step(PLAIN, engine, step, trace)
        engine.module.destroy()
        found[f"zero_{stage}"] = trace.losses
    engine, trace = make_engine(PLAIN, 2, 1), Trace()
    for step in range(2):
        train_step(PLAIN, engine, step, trace)
    engine.module.destroy()
    return {**found, "truth": trace.losses}
