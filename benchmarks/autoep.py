"""``autoep``: expert parallelism, ours against DeepSpeed's own AutoEP, on the same model, batch and processes (CPU, gloo).

The model is transformers' Qwen3-MoE, which AutoEP converts, and ours of the same sizes with the same weights. ``layer`` is one
MoE layer, forward and backward; ``step`` is a whole step with ZeRO 1 and the same AdamW. Both run in the same processes, in
turns. Bytes are those handed to all-to-all for other ranks, of all ranks together.
"""

import contextlib
import json
import tempfile
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.autoep_worker import Plan
from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.launch.local import run_local

LAYOUTS = tuple((processes, bf16) for processes in (2, 4) for bf16 in (False, True))
LOSS_LIMIT = {False: 1e-4, True: 1e-3}  # after steps of AdamW, which turns rounding into other experts for a few tokens
LAYER_LIMIT = {False: 1e-5, True: 5e-2}  # AutoEP weighs and adds experts' results in bf16, ours in fp32
SIZES = Plan(
    dim=512,
    num_layers=2,
    num_experts=32,
    top_k=8,
    hidden=256,
    vocab=4096,
    batch=8,
    length=256,
    repeats=9,
    steps_compared=3,
    bf16=False,
)
QUICK = replace(SIZES, dim=64, num_layers=1, num_experts=8, top_k=2, hidden=32, vocab=64, batch=2, length=16, repeats=2)


@cache
def _found(plan: Plan, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):  # the worker is a module of the benchmarks
        given, out = Path(folder) / "plan.json", Path(folder) / "found.json"
        given.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        status = run_local([str(given), str(out)], processes, module="benchmarks.autoep_worker")
        if status:
            raise RuntimeError(f"a process ended with status {status}; what it said is above")
        return json.loads(out.read_text(encoding="utf-8"))


def _plan(options: Options, bf16: bool) -> Plan:
    return replace(QUICK if options.quick else SIZES, bf16=bf16)


def _name(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def gate(options: Options) -> list[Check]:
    """One layer's output and gradient, and the losses of several steps, on every rank."""
    checks = []
    for processes, bf16 in LAYOUTS:
        found = _found(_plan(options, bf16), processes)
        theirs, ours = (np.array(found["losses"][name]) for name in ("AutoEP", "moe"))
        error = float(np.max(np.abs(ours - theirs) / theirs))
        where = f"{processes} processes, {_name(bf16)}"
        checks += [
            Check(name=f"{where}: layer", error=found["layer_error"], limit=LAYER_LIMIT[bf16]),
            Check(name=f"{where}: losses", error=error, limit=LOSS_LIMIT[bf16]),
        ]
        options.report(f"{where}: measured")
    return checks


def run(options: Options) -> list[Row]:
    """A row per part, layout and implementation; what was measured beside the gate's comparison."""
    rows: list[Row] = []
    for processes, bf16 in LAYOUTS:
        plan = _plan(options, bf16)
        found = _found(plan, processes)
        for part in ("layer", "step"):
            median = {name: float(np.median(entry["seconds"])) for name, entry in found[part].items()}
            for name, entry in found[part].items():
                milliseconds = np.quantile(entry["seconds"], (0.5, 0.2, 0.8)) * 1e3
                times = zip(("median_ms", "p20_ms", "p80_ms"), milliseconds, strict=True)
                rows.append(
                    {
                        "part": part,
                        "processes": processes,
                        "dtype": _name(bf16),
                        "implementation": name,
                        "size": f"D={plan.dim} F={plan.hidden} E={plan.num_experts} K={plan.top_k} "
                        f"layers={plan.num_layers} tokens={plan.batch * plan.length} a process",
                        **{key: round(float(value), 1) for key, value in times},
                        "repeats": len(entry["seconds"]),
                        "speedup": round(median["AutoEP"] / median[name], 2),
                        "sent_mb": round(entry["bytes"] / 1e6, 2),
                        "bytes_ratio": round(entry["bytes"] / found[part]["AutoEP"]["bytes"], 3),
                    }
                )
    return rows


_COLUMNS = (
    "part",
    "processes",
    "dtype",
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
