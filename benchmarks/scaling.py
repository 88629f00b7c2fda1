"""``scaling``: the planner against what real runs hold, weak scaling on this machine, and to 512 GPUs as the planner predicts it.

``memory`` trains the tiny recipe on two CPU processes in several layouts, counts live tensors by part, and sets the plan beside
them. ``processes`` trains it with 1, 2 and 4 processes on this machine and the same work for each, experts spread over all of
them; with more processes than cores each has a part of a core. ``weak`` runs nothing: it is the planner's prediction for
`configs/pretrain.yaml` with the work per GPU held constant, on the hardware and with the assumptions of
`moe/scaling/hardware.py`, which the rows name; its figures are no measurements.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.scaling_worker import WORLD, Case, recipe
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.launch.local import run_local
from moe.scaling.dry_run import simulated_model, step_bytes
from moe.scaling.hardware import HARDWARE
from moe.scaling.memory import MemoryPlan, engine_bytes, plan_memory
from moe.scaling.planner import Planner
from moe.scaling.shape import Layout, owned_parameters
from moe.train.config import load_config
from moe.train.metrics import read_metrics
from moe.train.optim import param_groups
from moe.train.plan import model_shape

LIMIT = 0.10
MATTERS = 0.2  # an error is relative to the part, or to this share of the peak where the part is smaller
PARTS = ("weights", "optimizer", "gradients", "activations", "exchange", "peak")
CASES = [
    Case(ep_size=ep, zero_stage=stage, precision=precision, micro_batch_size=size, grad_accum=accum, recompute=again)
    for ep in (1, 2)
    for stage in (0, 1, 2, 3)
    for precision, size, accum, again in (("fp32", 2, 1, False), ("bf16", 4, 1, True))
]
QUICK = [Case(ep_size=2, zero_stage=1, precision="bf16", micro_batch_size=1, grad_accum=1, recompute=False)]
PROCESSES = (1, 2, 4)
GPUS = (8, 16, 32, 64, 128, 256, 512)
SEQUENCES_PER_GPU, HARDWARE_NAME, VOCAB = 32, "h100", 49152


def _cases(options: Options) -> list[Case]:
    return QUICK if options.quick else CASES


@cache
def _measured(quick: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):  # the worker is a module of the benchmarks
        given, out = Path(folder) / "cases.json", Path(folder) / "found.json"
        given.write_text(json.dumps([asdict(case) for case in _cases(Options(quick=quick))]), encoding="utf-8")
        status = run_local([str(given), str(out)], WORLD, module="benchmarks.scaling_worker")
        if status:
            raise RuntimeError(f"a process ended with status {status}; what it said is above")
        return json.loads(out.read_text(encoding="utf-8"))


@cache
def _planned(case: Case) -> MemoryPlan:
    config, shape = recipe()
    with simulated_model(shape, case.layout) as (model, _):
        groups = [group["params"] for group in param_groups(model, config.optim)]
        owned = owned_parameters(model, groups, total=0)
    return plan_memory(engine_bytes(owned, case.layout, rank=0), step_bytes(shape, case.layout), case.layout)


def gate(options: Options) -> list[Check]:
    """Every part of every layout within the limit."""
    checks = []
    for case, measured in zip(_cases(options), _measured(options.quick), strict=True):
        for part in PARTS:
            error = abs(getattr(_planned(case), part) - measured[part]) / max(
                measured[part], MATTERS * measured["peak"]
            )
            checks.append(Check(name=f"{_name(case)}: {part}", error=error, limit=LIMIT))
    return checks


def _name(case: Case) -> str:
    again = ", recompute" if case.recompute else ""
    return f"EP {case.ep_size}, ZeRO {case.zero_stage}, {case.precision}, micro-batch {case.micro_batch_size}{again}"


def _memory_rows(options: Options) -> list[Row]:
    rows: list[Row] = []
    for case, measured in zip(_cases(options), _measured(options.quick), strict=True):
        for part in PARTS:
            planned = getattr(_planned(case), part)
            rows.append(
                {
                    "part": "memory",
                    "case": _name(case),
                    "what": part,
                    "measured_mb": round(measured[part] / 1e6, 3),
                    "planned_mb": round(planned / 1e6, 3),
                    "error": round(planned / measured[part] - 1, 4) if measured[part] else None,
                }
            )
    return rows


def _weak_rows(options: Options) -> list[Row]:
    config = load_config(ROOT / "configs" / "pretrain.yaml", [f"model.decoder.vocab_size={VOCAB}"])
    shape, hardware = model_shape(config), HARDWARE[HARDWARE_NAME]
    rows: list[Row] = []
    first: dict[int, float] = {}
    for gpus in GPUS[:1] if options.quick else GPUS:
        base = Layout(world_size=gpus, zero_stage=1, micro_batch_size=8, grad_accum=SEQUENCES_PER_GPU // 8)
        planner = Planner(
            shape,
            hardware,
            base,
            gpus * SEQUENCES_PER_GPU,
            lambda model: [group["params"] for group in param_groups(model, config.optim)],
        )
        for ep_size in (1, 8, 32):
            if gpus % ep_size:
                continue
            candidate = planner.plan(replace(base, ep_size=ep_size))
            speed = candidate.time.tokens_per_second
            first.setdefault(ep_size, speed)
            rows.append(
                {
                    "part": "weak",
                    "case": f"configs/pretrain.yaml, {HARDWARE_NAME}, EP {ep_size}, ZeRO 1, micro-batch 8 x 4",
                    "what": f"{gpus} GPUs",
                    "planned_mb": round(candidate.memory.peak / 1e6),
                    "predicted_step_s": round(candidate.time.total, 4),
                    "predicted_tokens_per_gpu": round(speed),
                    "predicted_mfu": round(candidate.time.mfu, 4),
                    "predicted_efficiency": round(speed / first[ep_size], 4),
                    "assumptions": json.dumps(asdict(hardware)),
                }
            )
            options.report(f"{gpus} GPUs, EP {ep_size}: predicted {speed:.0f} tokens/s/GPU")
    return rows


def _process_rows(options: Options) -> list[Row]:
    rows: list[Row] = []
    cores = len(os.sched_getaffinity(0))
    for processes in PROCESSES[:1] if options.quick else PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            overrides = {
                "parallel.processes": processes,
                "parallel.ep_size": processes,
                "train.micro_batch_size": 8,
                "train.batch_size": 8 * processes,
                "train.steps": 5 if options.quick else 30,
                "train.eval_windows": 1,
                "train.sample_tokens": 0,
                "optim.warmup_steps": 2,
                "log.wandb": "off",
                "log.run_root": folder,
            }
            command = [sys.executable, "-m", "moe.cli", "train", str(ROOT / "configs" / "tiny.yaml"), "--json"]
            command += [f"{key}={value}" for key, value in overrides.items()]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process is to be a core's worth, also alone
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=one_thread)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
            records = read_metrics(Path(folder) / "tiny").train
        speed = statistics.median(record["tokens_per_second"] for record in records[len(records) // 3 :])
        first = float(rows[0]["tokens_per_second"] or 0) if rows else speed
        rows.append(
            {
                "part": "processes",
                "case": f"configs/tiny.yaml, EP {processes}, 8 sequences and 1 thread a process, {cores} cores",
                "what": f"{processes} processes",
                "tokens_per_second": round(speed),
                "of_linear": round(speed / (first * processes), 3),
                "of_cores": round(speed / (first * min(processes, cores)), 3),
            }
        )
        options.report(f"{processes} processes: {speed:.0f} tokens/s")
    return rows


_PARTS = {"memory": _memory_rows, "processes": _process_rows, "weak": _weak_rows}


def run(options: Options) -> list[Row]:
    """Rows of both parts, or of the one asked for."""
    return [row for name, rows in _PARTS.items() if options.part in (None, name) for row in rows(options)]


_COLUMNS = (
    "part",
    "case",
    "what",
    "measured_mb",
    "planned_mb",
    "error",
    "tokens_per_second",
    "of_linear",
    "of_cores",
    "predicted_step_s",
    "predicted_tokens_per_gpu",
    "predicted_mfu",
    "predicted_efficiency",
    "assumptions",
)

BENCHMARK = Benchmark(
    name="scaling",
    description="the planner's memory against real runs (CPU, 2 processes); weak scaling to 512 GPUs as predicted",
    columns=_COLUMNS,
    table=_COLUMNS[:-1],
    gate=gate,
    run=run,
    parts=tuple(_PARTS),
)
