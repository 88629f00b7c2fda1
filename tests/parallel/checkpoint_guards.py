"""What two ranks do for `test_checkpoint_guards`: save while training goes on, fail at it, tamper with what was saved.

Each function returns what a rank saw; the folders that they leave are looked at afterwards.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from checkpoint_runs import PLAIN, whole_tensors
from safetensors import safe_open
from tiny_run import NUM_EXPERTS, Trace, build_model, make_engine, train_step
from torch import Tensor

from moe.layer import moe_layers
from moe.parallel import checkpoint, state
from moe.parallel.checkpoint import CheckpointError, Saver, loading, saving
from moe.parallel.checkpoint.files import FileRecord, write_manifest
from moe.parallel.checkpoint.tensor_file import write_tensors
from moe.parallel.engine import Engine

EXPERTS = "model.layers.1.mlp.experts.down_proj"
DENSE = "model.layers.1.self_attn.q_proj.weight"
LOCAL = NUM_EXPERTS // 2
Tensors = dict[str, Tensor]


def work(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """Everything, on each of two ranks."""
    engine = make_engine(PLAIN, 2, 1)
    train_step(PLAIN, engine, 0, Trace())
    found = {
        "beside": save_beside_training(root / "beside", engine),
        "failures": fail_beside_training(root / "failures", engine),
        "lonely": end_without_the_others(root / "lonely", engine),
        "other_disk": write_to_another_disk(root / f"disk-{rank}", engine),
        "foreign": refuse_foreign_weights(root / "foreign", engine),
        "tampered": tamper(root / "tampered", engine),
    }
    engine.module.destroy()
    engine = make_engine(PLAIN, 2, 1, build_model(PLAIN, seed=7))
    found["misplaced"] = misplace(root / "tampered" / "step-00000001", engine)
    engine.module.destroy()
    found["drift"] = drift(root / "drift")
    return found


@contextmanager
def slow_writes(release: threading.Event, entered: threading.Event) -> Iterator[None]:
    """The threads write nothing until they are told to."""

    def write(*arguments: Any) -> FileRecord:
        entered.set()
        assert release.wait(60)
        return write_tensors(*arguments)

    with mock.patch.object(saving, "write_tensors", write):
        yield


def save_beside_training(root: Path, engine: Engine) -> dict[str, Any]:
    """Two saves; while the first is being written, a step is made."""
    saver, release, entered = Saver(root, engine, keep_last=5), threading.Event(), threading.Event()
    before = whole_tensors(engine)
    with slow_writes(release, entered):
        saver.begin(1, {})
        buffers = [tensor.data_ptr() for tensor in saver._memory._buffers.values()]
        assert entered.wait(60)
        train_step(PLAIN, engine, 1, Trace())
        after = whole_tensors(engine)
        found: dict[str, Any] = {"meanwhile": (saver.under_way, saver.busy, checkpoint.list_checkpoints(root))}
        try:
            saver.begin(2, {})
        except AssertionError as problem:
            found["second"] = str(problem)
        dist.barrier()
        release.set()
        first = saver.collect()
    found["idle"] = (saver.under_way, saver.busy)
    saver.begin(2, {})
    found["reused"] = buffers == [tensor.data_ptr() for tensor in saver._memory._buffers.values()]
    second = saver.collect()
    found["errors"] = (first.error, second.error, first.warnings, second.warnings)
    dist.barrier()
    for saved, expected in ((first, before), (second, after)):
        reader = checkpoint.CheckpointReader(saved.path)
        for name, tensor in expected.items():
            kind, _, key = name.partition("/")
            if kind != "optimizer_steps":
                assert torch.equal(reader.tensor(kind, key), tensor), (saved.step, name)
    return found


def fail_beside_training(root: Path, engine: Engine) -> dict[str, Any]:
    """A good save; then rank 1 cannot write its file; then it cannot even say so."""
    saver, rank, found = Saver(root, engine, keep_last=5, timeout_seconds=60), dist.get_rank(), {}

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    def save(step: int) -> tuple[str | None, float]:
        saver.begin(step, {})
        begin = time.monotonic()
        return saver.collect().error, time.monotonic() - begin

    found["good"] = save(1)
    with mock.patch.object(saving, "write_tensors", fail if rank == 1 else write_tensors):
        found["failed"] = save(2)
        with mock.patch.object(saving, "write_record", fail if rank == 1 else saving.write_record):
            found["silent"] = save(3)
    with mock.patch.object(saving, "write_tensors", fail if rank == 0 else write_tensors):
        found["rank_0"] = save(4)
    dist.barrier()
    found["names"] = sorted(path.name for path in root.iterdir())
    dist.barrier()
    return found


def end_without_the_others(root: Path, engine: Engine) -> dict[str, Any]:
    """Training fails while a checkpoint is being written: once all have written theirs, and once one never does."""
    rank = dist.get_rank()
    saver = Saver(root, engine, keep_last=5)
    saver.begin(1, {})
    saver.abandon()  # no collective from here on
    dist.barrier()
    found = {"complete": [path.name for path in checkpoint.list_checkpoints(root)]}
    never = (
        mock.patch.object(Saver, "_write_own", lambda *_: None)
        if rank == 1
        else mock.patch.object(Saver, "x", 0, create=True)
    )
    with never, mock.patch.object(saving, "_ABANDON_SECONDS", 0.3):
        saver = Saver(root, engine, keep_last=5)
        saver.begin(2, {})
        begin = time.monotonic()
        saver.abandon()
        found["seconds"] = time.monotonic() - begin
    dist.barrier()
    found["names"] = sorted(path.name for path in root.iterdir())
    return found


def write_to_another_disk(root: Path, engine: Engine) -> str | None:
    """Each rank has a folder of its own, as on machines without a shared disk."""
    saver = Saver(root, engine, keep_last=5, timeout_seconds=0.5)
    saver.begin(1, {})
    return saver.collect().error


def refuse_foreign_weights(root: Path, engine: Engine) -> str | None:
    """What DeepSpeed puts together for an expert is not what this rank computes with: another rank's, say."""
    full_weight = state.full_weight

    def rolled(engine: Engine, parameter: Any) -> Tensor:
        weight = full_weight(engine, parameter)
        return weight.roll(1, 0) if weight.shape[0] == LOCAL else weight

    with mock.patch.object(state, "full_weight", rolled):
        return checkpoint.save(root, 1, engine, {}, keep_last=5).error


# ---- checkpoints whose files are as the manifest says, and yet wrong ----


def read_all(path: Path) -> dict[str, Tensors]:
    files = {}
    for file in sorted(path.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files[file.name] = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    return files


def swap_rows(tensor: Tensor, a: int, b: int) -> None:
    tensor[[a, b]] = tensor[[b, a]]


def swap_two_experts(files: dict[str, Tensors]) -> None:
    for tensors in files.values():
        if f"weight/{EXPERTS}@{LOCAL}" in tensors:
            swap_rows(tensors[f"weight/{EXPERTS}@{LOCAL}"], 1, 3)


def swap_two_moments(files: dict[str, Tensors]) -> None:
    for tensors in files.values():
        if f"exp_avg/{EXPERTS}@0" in tensors:
            swap_rows(tensors[f"exp_avg/{EXPERTS}@0"], 0, 2)


def first_experts_twice(files: dict[str, Tensors]) -> None:
    (first,) = [
        tensors[f"exp_avg_sq/{EXPERTS}@0"] for tensors in files.values() if f"exp_avg_sq/{EXPERTS}@0" in tensors
    ]
    for tensors in files.values():
        if f"exp_avg_sq/{EXPERTS}@{LOCAL}" in tensors:
            tensors[f"exp_avg_sq/{EXPERTS}@{LOCAL}"] = first.clone()


def moments_of_another_parameter(files: dict[str, Tensors]) -> None:
    other = DENSE.replace("layers.1", "layers.2")
    (values,) = [tensors[f"exp_avg/{other}"] for tensors in files.values() if f"exp_avg/{other}" in tensors]
    for tensors in files.values():
        if f"exp_avg/{DENSE}" in tensors:
            tensors[f"exp_avg/{DENSE}"] = values.clone()


def another_bias(files: dict[str, Tensors]) -> None:
    name = next(key for key in files["rank-0000.safetensors"] if key.endswith("bias_E"))
    files["rank-0000.safetensors"][name] += 1e-3


def relabel(files: dict[str, Tensors]) -> None:
    for tensors in files.values():
        if f"weight/{EXPERTS}@{LOCAL}" in tensors:
            tensors[f"weight/{EXPERTS}@0"] = tensors.pop(f"weight/{EXPERTS}@{LOCAL}")


TAMPERS: dict[str, Callable[[dict[str, Tensors]], None]] = {
    "swapped_experts": swap_two_experts,
    "swapped_moments": swap_two_moments,
    "first_experts_twice": first_experts_twice,
    "moments_of_another_parameter": moments_of_another_parameter,
    "another_bias": another_bias,
    "first_experts_relabelled": relabel,
    "no_checksums": lambda files: None,
}


def tampered_copy(good: Path, name: str) -> Path:
    """A copy with other tensors under the old checksums, and a manifest that says so."""
    path = good.with_name(name)
    shutil.copytree(good, path)
    files = read_all(path)
    TAMPERS[name](files)
    records = {}
    for file, tensors in files.items():
        with safe_open(good / file, framework="pt") as opened:
            metadata = opened.metadata()
        if name == "no_checksums":
            metadata["checksums"] = "{}"
        records[file] = write_tensors(path / file, tensors, metadata)
    manifest = json.loads((path / "manifest.json").read_text())
    records["state.json"] = FileRecord(**manifest["state.json"])
    write_manifest(path, records)
    return path


def tamper(root: Path, engine: Engine) -> dict[str, str | None]:
    """Load tampered checkpoints, and then the good one."""
    good = checkpoint.save(root, 1, engine, {}, keep_last=5).path
    if dist.get_rank() == 0:
        for name in TAMPERS:
            checkpoint.verify(tampered_copy(good, name))
    dist.barrier()
    found = {name: load_error(root / name, engine) for name in TAMPERS}
    found["good"] = load_error(good, engine)
    return found


def load_error(path: Path, engine: Engine) -> str | None:
    try:
        checkpoint.load(path, engine)
    except CheckpointError as problem:
        return str(problem)
    return None


def misplace(good: Path, engine: Engine) -> dict[str, str | None]:
    """A good checkpoint, and a loader that puts things in wrong places."""
    read, set_full, found = loading._read, state.set_full, {}

    def other_ranks_experts(reader: Any, kind: str, holding: Any) -> Tensor:
        if holding.first_expert is None:
            return read(reader, kind, holding)
        first = LOCAL - holding.first_expert
        return reader.tensor(kind, holding.name, first, first + LOCAL)

    def no_second_moment(engine: Engine, parameter: Any, weight: Tensor, moments: dict[str, Tensor]) -> None:
        set_full(engine, parameter, weight, {key: value for key, value in moments.items() if key == "exp_avg"})

    def stale_model(engine: Engine, parameter: Any, weight: Tensor, moments: dict[str, Tensor]) -> None:
        set_full(engine, parameter, weight, moments)
        parameter.data.add_(1)

    with mock.patch.object(loading, "_read", other_ranks_experts):
        found["other_ranks_experts"] = load_error(good, engine)
    with mock.patch.object(state, "set_full", no_second_moment):
        found["no_second_moment"] = load_error(good, engine)
    with mock.patch.object(state, "set_full", stale_model):
        found["stale_model"] = load_error(good, engine)
    found["good"] = load_error(good, engine)
    return found


def drift(root: Path) -> dict[str, list[str]]:
    """ZeRO 0, where ranks hold the same numbers; rank 1 changes some of its own."""
    engine, rank = make_engine(PLAIN, 1, 0), dist.get_rank()
    train_step(PLAIN, engine, 0, Trace())
    parameters = dict(engine.named_parameters())
    states = engine.module.basic_optimizer.state
    layer = moe_layers(engine.model)["model.layers.2.mlp"]

    def saved() -> list[str]:
        done = checkpoint.save(root, 1, engine, {}, keep_last=5)
        assert done.error is None
        return done.warnings

    found = {"same": saved()}
    if rank == 1:
        parameters[EXPERTS].data[3, 0, 0] += 1e-7
    found["expert"] = saved()
    if rank == 1:
        parameters[EXPERTS].data[3, 0, 0] = 0.0
        states[parameters[DENSE]]["exp_avg_sq"][0, 0] *= 1.5
        layer.router.bias_E[2] += 1e-3
    elif rank == 0:
        parameters[EXPERTS].data[3, 0, 0] = 0.0
    found["moment_and_bias"] = saved()
    engine.module.destroy()
    return found
