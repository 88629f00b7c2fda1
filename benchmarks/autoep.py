"""``autoep``: expert parallelism, ours against DeepSpeed's own AutoEP, on the same model, batch and processes (CPU, gloo).

The model is transformers' Qwen3-MoE, which AutoEP converts, and ours of the same sizes with the same weights. ``layer`` is one
MoE layer, forward and backward; ``step`` is a whole step with ZeRO 1 and the same AdamW. Both run in the same processes, in
turns. Bytes are those handed to all-to-all for other ranks, of all ranks together.
"""

import contextlib
import json
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.autoep_worker import Plan
from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.launch.local import run_local

PROCESSES = (2, 4)
LOSS_LIMIT, LAYER_LIMIT = 1e-5, 1e-5
SIZES = Plan(
    dim=512,
    num_layers=2,
    num_experts=32,
    top_k=8,
    hidden=256,
    vocab=4096,
    batch=4,
    length=256,
    repeats=9,
    steps_compared=5,
)
QUICK = Plan(
    dim=64, num_layers=1, num_experts=8, top_k=2, hidden=32, vocab=64, batch=2, length=16, repeats=2, steps_compared=2
)


@cache
def _found(plan: Plan, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):  # the worker is a module of the benchmarks
        given, out = Path(folder) / "plan.json", Path(folder) / "found.json"
        given.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        status = run_local([str(given), str(out)], processes, module="benchmarks.autoep_worker")
        if status:
            raise RuntimeError(f"a process ended with status {status}; what it said is above")
        return json.loads(out.read_text(encoding="utf-8"))


def _plan(options: Options) -> Plan:
    return QUICK if options.quick else SIZES


def gate(options: Options) -> list[Check]:
    """One layer's output and gradient, and the losses of several steps, on every rank."""
    checks = []
    for processes in PROCESSES:
        found = _found(_plan(options), processes)
        theirs, ours = (np.array(found["losses"][name]) for name in ("AutoEP", "moe"))
        error = float(np.max(np.abs(ours - theirs) / theirs))
        checks += [
            Check(name=f"{processes} processes: layer", error=found["layer_error"], limit=LAYER_LIMIT),
            Check(name=f"{processes} processes: losses", error=error, limit=LOSS_LIMIT),
        ]
        options.report(f"{processes} processes measured")
    return checks


def run(options: Options) -> list[Row]:
    """A row per part, number of processes and implementation; what was measured beside the gate's comparison."""
    plan, rows = _plan(options), []
    for processes in PROCESSES:
        found = _found(plan, processes)
        for part in ("layer", "step"):
            median = {name: float(np.median(entry["seconds"])) for name, entry in found[part].items()}
            for name, entry in found[part].items():
                milliseconds = np.quantile(entry["seconds"], (0.5, 0.2, 0.8)) * 1e3
                row: Row = {
                    "part": part,
                    "processes": processes,
                    "implementation": name,
                    "size": f"D={plan.dim} F={plan.hidden} E={plan.num_experts} K={plan.top_k} layers={plan.num_layers} "
                    f"tokens={plan.batch * plan.length} a process",
                    **dict(
                        zip(
                            ("median_ms", "p20_ms", "p80_ms"), (round(float(ms), 1) for ms in milliseconds), strict=True
                        )
                    ),
                    "repeats": len(entry["seconds"]),
                    "speedup": round(median["AutoEP"] / median[name], 2),
                    "sent_mb": round(entry["bytes"] / 1e6, 2),
                    "bytes_ratio": round(entry["bytes"] / found[part]["AutoEP"]["bytes"], 3),
                }
                rows.append(row)
    return rows


_COLUMNS = (
    "part",
    "processes",
    "implementation",
    "size",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repeats",
    "speedup",
    "sent_mb",
    "bytes_ratio",
)

BENCHMARK = Benchmark(
    name="autoep",
    description="expert parallelism against DeepSpeed's AutoEP: one layer, a whole step, bytes sent (CPU, 2 and 4 processes)",
    columns=_COLUMNS,
    table=tuple(column for column in _COLUMNS if column not in ("size", "repeats")),
    gate=gate,
    run=run,
)
