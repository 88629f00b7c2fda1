"""`checkpoint`: how long training stands still for a checkpoint, and what its parts cost.

One process on the CPU, ZeRO 1, AdamW: weights and two moments in fp32, 12 bytes a parameter. Three ways to save the same
state, in turns: wait until it is written (copy, checksums, sha256, write, sync, rename), write it beside training, and
DeepSpeed's ``save_checkpoint``, which waits too and leaves neither checksums nor a synced disk. Of what is written beside
training only the time counts in which no step can run; the steps meanwhile are timed as well. The parts are timed alone.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.timing import TIMING_COLUMNS, Timing, in_turns, wait_until_idle
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel import checkpoint
from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.snapshot import HostMemory, take_snapshot
from moe.parallel.checkpoint.tensor_file import write_tensors
from moe.parallel.engine import Engine

WAIT, BESIDE, DEEPSPEED = "wait until written", "beside training", "deepspeed save_checkpoint"
CHECKSUMS, FILE = "part: checksums", "part: write, sha256 and sync"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model that is saved."""

    dim: int
    num_layers: int
    num_experts: int
    batch: int = 2
    length: int = 64


SIZE = Size(dim=512, num_layers=6, num_experts=16)
QUICK_SIZE = Size(dim=32, num_layers=2, num_experts=4)


def join() -> None:
    """A group of one process, for as long as it runs: DeepSpeed keeps the groups that it made from the first."""
    if not dist.is_initialized():
        from moe.parallel.ranks import init_ranks

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        init_ranks("cpu", 600)


def make_engine(size: Size) -> Engine:
    """An engine after one step, so that moments exist."""
    decoder = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=size.dim,
        intermediate_size=2 * size.dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        max_position_embeddings=size.length,
    )
    torch.manual_seed(0)
    model = MoEForCausalLM(
        MoEConfig(text_config=decoder, moe={"num_experts": size.num_experts, "expert_hidden": size.dim})
    )
    model.config.use_cache = False
    groups = [{"name": "all", "params": [name for name, _ in model.named_parameters()]}]
    config = {
        "train_micro_batch_size_per_gpu": size.batch,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 2**31,
    }
    engine = Engine(model.train(), groups, torch.optim.AdamW, {"lr": 1e-4, "fused": True}, config, ep_size=1)
    train_step(engine, size)
    return engine


def train_step(engine: Engine, size: Size) -> None:
    """One step on random tokens."""
    ids_BL = torch.randint(4096, (size.batch, size.length))
    engine.backward(engine.module(input_ids=ids_BL, labels=ids_BL).loss)
    engine.step()


def gate(options: Options) -> list[Check]:
    """A checkpoint that was written beside training is the state at its beginning, to the last bit."""
    join()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = make_engine(QUICK_SIZE)
        before = {key: tensor.clone() for key, tensor in take_snapshot(engine, HostMemory()).tensors.items()}
        saver = checkpoint.Saver(folder, engine, keep_last=1)
        saver.begin(1, {})
        train_step(engine, QUICK_SIZE)
        saved = saver.collect()
        wrong = 0.0 if saved.error is None else float("inf")
        reader = checkpoint.CheckpointReader(saved.path)
        for key, tensor in before.items():
            kind, slash, rest = key.partition("/")
            if slash:
                wrong += not torch.equal(reader.checked_tensor(kind, rest.partition("@")[0]), tensor)
        engine.module.destroy()
    return [Check(name=f"{len(before)} tensors, those that differ", error=wrong, limit=0.0)]


@dataclass(kw_only=True)
class _Times:
    """Seconds of the repeats: training stood still; a step with nothing beside it, and beside a save; until written."""

    blocked: dict[str, list[float]]
    steps_alone: list[float]
    steps_beside: list[float]
    until_written: list[float]


def _repeat(engine: Engine, saver: checkpoint.Saver, folder: Path, size: Size, number: int, times: _Times) -> None:
    start = time.perf_counter()
    saver.begin(number, {})
    assert saver.collect().error is None
    times.blocked[WAIT].append(time.perf_counter() - start)

    start = time.perf_counter()
    engine.module.save_checkpoint(str(folder / "deepspeed"), tag="last")
    times.blocked[DEEPSPEED].append(time.perf_counter() - start)

    for _ in range(2):
        start = time.perf_counter()
        train_step(engine, size)
        times.steps_alone.append(time.perf_counter() - start)
    begun = time.perf_counter()
    saver.begin(number, {})
    blocked = time.perf_counter() - begun
    while saver.busy:
        start = time.perf_counter()
        train_step(engine, size)
        times.steps_beside.append(time.perf_counter() - start)
    times.until_written.append(time.perf_counter() - begun)
    start = time.perf_counter()
    assert saver.collect().error is None
    times.blocked[BESIDE].append(blocked + time.perf_counter() - start)


def _parts(engine: Engine, folder: Path, options: Options) -> dict[str, Timing]:
    shot = take_snapshot(engine, HostMemory())
    tensors = {key: tensor for key, tensor in shot.tensors.items() if "/" in key}

    def hash_all() -> list[list[str]]:
        return [checksums(tensor, key in shot.experts) for key, tensor in tensors.items()]

    functions = {CHECKSUMS: hash_all, FILE: lambda: write_tensors(folder / "part", tensors, {})}
    return in_turns(functions, options.repeats, options.wait_s)


def run(options: Options) -> list[Row]:
    """Measure; see the module."""
    size = QUICK_SIZE if options.quick else SIZE
    times = _Times(blocked={WAIT: [], DEEPSPEED: [], BESIDE: []}, steps_alone=[], steps_beside=[], until_written=[])
    join()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = make_engine(size)
        tensors: dict[str, Tensor] = take_snapshot(engine, HostMemory()).tensors
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        saver = checkpoint.Saver(folder, engine, keep_last=1)
        for repeat in range(-1, options.repeats):
            wait_until_idle(options.wait_s)
            _repeat(engine, saver, folder, size, repeat + 2, times)
            if repeat < 0:
                for values in (*times.blocked.values(), times.steps_alone, times.steps_beside, times.until_written):
                    values.clear()
            options.report(f"  round {repeat + 1} of {options.repeats}")
        saver.release()
        parts = _parts(engine, folder, options)
        engine.module.destroy()
    case = f"{num_bytes / 12e6:.0f}M parameters, {num_bytes / 1e9:.2f} GB"
    blocked = {name: Timing(seconds=tuple(seconds), waiting=None) for name, seconds in times.blocked.items()}
    rows: list[Row] = []
    for name, timing in (blocked | parts).items():
        median = float(np.median(timing.seconds))
        row: Row = {
            "case": case,
            "implementation": name,
            **timing.columns(),
            "gb_per_s": round(num_bytes / 1e9 / median, 2),
        }
        row["of_wait"] = round(median / float(np.median(times.blocked[WAIT])), 3)
        if name == BESIDE:
            row["until_written_ms"] = round(1e3 * float(np.median(times.until_written)), 1)
            row["step_alone_ms"] = round(1e3 * float(np.median(times.steps_alone)), 1)
            row["step_beside_ms"] = round(1e3 * float(np.median(times.steps_beside)), 1) if times.steps_beside else None
        rows.append(row)
    return rows


COLUMNS = (
    "case",
    "implementation",
    *TIMING_COLUMNS,
    "of_wait",
    "gb_per_s",
    "until_written_ms",
    "step_alone_ms",
    "step_beside_ms",
)
BENCHMARK = Benchmark(
    name="checkpoint",
    description="how long training stands still for a checkpoint: waited for, written beside training, and DeepSpeed's",
    columns=COLUMNS,
    table=tuple(column for column in COLUMNS if column not in ("repeats", "waiting")),
    gate=gate,
    run=run,
)
