"""Gate and rows of ``gpu-layer``; see the package."""

import subprocess
import time

import torch

from benchmarks.gpu_layer.implementations import DENSE, IMPLEMENTATIONS, OURS, SWIGLU_ONLY, Inputs
from benchmarks.gpu_layer.measure import make_inputs, measure
from benchmarks.gpu_layer.shapes import CASES, QUICK_CASES, Case
from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.verify import compare, relative_error

BUDGET_S = 330.0  # of measuring; rows that do not fit any more are reported, not guessed
GATE_CASES = [
    Case(table="gate", num_tokens=1000, dim=256, hidden=192, num_experts=32, top_k=4, routing=routing)
    for routing in ("uniform", "zipf", "one expert")
]


def _device_name() -> str:
    """The card and its driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return torch.cuda.get_device_name()
    return f"{torch.cuda.get_device_name()}, driver {driver.strip()}"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError("gpu-layer needs a CUDA device; its cells stay empty without one")
    return torch.device("cuda")


def _results(name: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    y_TD = IMPLEMENTATIONS[name](inputs)
    gradients = torch.autograd.grad(y_TD, inputs.leaves, inputs.dy_TD)
    return dict(zip(("y", "dx", "dweights", "dw_up", "dw_down"), (y_TD.detach(), *gradients), strict=True))


def _truth(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The reference implementation in float64, on the GPU."""
    from moe.kernels import reference
    from moe.routers.assemble import routing_of_choices

    x_TD, weights_TK, w_up_EHD, w_down_EDF = (leaf.detach().double().requires_grad_() for leaf in inputs.leaves)
    routing = routing_of_choices(inputs.experts_TK, weights_TK, w_up_EHD.shape[0])
    y_TD = reference.expert_ffn(x_TD, routing, w_up_EHD, w_down_EDF, inputs.activation)
    gradients = torch.autograd.grad(y_TD, (x_TD, weights_TK, w_up_EHD, w_down_EDF), inputs.dy_TD.double())
    return dict(zip(("y", "dx", "dweights", "dw_up", "dw_down"), (y_TD.detach(), *gradients), strict=True))


def gate(options: Options) -> list[Check]:
    """Every implementation but the dense one gives the float64 result and gradients, twice; ours the same bits."""
    device, checks = _device(), []
    for case in GATE_CASES:
        inputs = make_inputs(case, device)
        truth = _truth(inputs)
        for name in IMPLEMENTATIONS:
            if name != DENSE:
                checks += compare(f"{case.routing}, {name}", _results(name, inputs), truth, torch.bfloat16)
        first, second = _results(OURS, inputs), _results(OURS, inputs)
        changed = max(relative_error(second[key], first[key]) for key in first)
        checks.append(Check(name=f"{case.routing}, {OURS}: repeats bit for bit", error=changed, limit=0.0))
    return checks


def _rows(case: Case, device: torch.device, repeats: int, options: Options) -> list[Row]:
    inputs, rows = make_inputs(case, device), []
    for name, implementation in IMPLEMENTATIONS.items():
        if name in SWIGLU_ONLY and case.activation != "swiglu":
            continue
        row: Row = {
            "device": _device_name(),
            "part": case.table, "routing": case.routing, "T": case.num_tokens, "D": case.dim, "F": case.hidden,
            "E": case.num_experts, "K": case.top_k, "activation": case.activation, "implementation": name,
        }  # fmt: skip
        try:
            cost = measure(implementation, inputs, repeats)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["note"] = f"failed: {str(error).splitlines()[0][:120]}"
            torch.cuda.empty_cache()
        else:
            tera = case.flop_forward / 1e9
            row |= {
                "forward_ms": round(cost.forward_ms, 4),
                "full_ms": round(cost.full_ms, 4),
                "forward_tflops": round(tera / cost.forward_ms, 1),
                "backward_tflops": round(2 * tera / max(cost.full_ms - cost.forward_ms, 1e-9), 1),
                "full_tflops": round(3 * tera / cost.full_ms, 1),
                "peak_gib": round(cost.peak_gib, 3),
                "kept_gib": round(cost.kept_gib, 4),
                "least_kept_gib": round(case.kept_gib, 4),
                "noise": round(cost.noise, 3),
            }
        rows.append(row)
    theirs = [
        float(row["full_ms"] or 0) for row in rows if "grouped_mm" in str(row["implementation"]) and "full_ms" in row
    ]
    mine = next((row for row in rows if row["implementation"] == OURS and "full_ms" in row), None)
    if mine and theirs:
        mine["speedup"] = round(min(theirs) / float(mine["full_ms"] or 0), 2)
    options.report(
        f"{case.table} {case.routing} T={case.num_tokens} D={case.dim} F={case.hidden} E={case.num_experts} K={case.top_k}: "
        + ", ".join(f"{row['implementation']} {row.get('forward_tflops')}/{row.get('full_tflops')}" for row in rows)
    )
    return rows


def run(options: Options) -> list[Row]:
    """Rows in the order of `CASES` until the time is used up; those left out are said."""
    device, started, rows = _device(), time.monotonic(), []
    cases = QUICK_CASES if options.quick else CASES
    for index, case in enumerate(cases):
        if time.monotonic() - started > BUDGET_S:
            options.report(f"out of time: {len(cases) - index} of {len(cases)} cases were not measured")
            break
        rows += _rows(case, device, options.repeats, options)
        torch.cuda.empty_cache()
    return rows


BENCHMARK = Benchmark(
    name="gpu-layer",
    description="the expert FFN on one GPU against grouped_mm, transformers and a dense FFN, on the published tables",
    columns=(
        "part", "routing", "T", "D", "F", "E", "K", "activation", "implementation", "forward_ms", "full_ms",
        "forward_tflops", "backward_tflops", "full_tflops", "speedup", "peak_gib", "kept_gib", "least_kept_gib", "noise",
        "note",
    ),
    table=(
        "part", "routing", "T", "D", "F", "E", "K", "activation", "implementation",
        "forward_tflops", "backward_tflops", "full_tflops", "speedup", "peak_gib", "kept_gib", "note",
    ),
    gate=gate,
    run=run,
)  # fmt: skip
