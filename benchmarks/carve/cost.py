"""Time and memory of carving one layer, each method in a process of its own: memory is the process's peak above its start."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.carve import released
from benchmarks.carve.cells import SHAPES
from benchmarks.spec import Row
from moe.convert.carve import CARVERS
from moe.convert.carve.refit import refit
from moe.convert.carve.types import CarveShape, Carving, LayerInputs
from moe.convert.dense import DenseFFN

RELEASED, REFIT = "cmoe, released code's steps", "refit"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement.

    Attributes:
        method: a key of `CARVERS`, or one of the two above.
        layer: file with the FFN and its inputs.
        repeats: after one that is not counted.
    """

    method: str
    layer: Path
    shape: CarveShape
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of each repeat, and the peak in MB above what the process had before; ``None`` where it cannot be told."""

    seconds: list[float]
    peak_mb: float | None


def save_layer(ffn: DenseFFN, inputs: LayerInputs, path: Path) -> None:
    """Tensors alone, which are read without unpickling."""
    tensors = {**vars(ffn), **vars(inputs)}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def measure(job: Job) -> Cost:
    """Run a job in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (job,))


def _measure(job: Job) -> Cost:
    tensors = torch.load(job.layer, weights_only=True)
    inputs = LayerInputs(**{name: tensors.pop(name) for name in ("x_TD", "weights_T", "sequence_T")})
    ffn = DenseFFN(gate_FD=tensors.get("gate_FD"), up_FD=tensors["up_FD"], down_DF=tensors["down_DF"])
    work, seconds = _work(job, ffn, inputs), []
    work()  # not counted
    before = _forget_peak()
    for _ in range(job.repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return Cost(seconds=seconds, peak_mb=None if before is None else (_memory_kb("VmHWM") - before) / 1024)


def _forget_peak() -> int | None:
    """Let the process's peak memory start anew; its memory now in KB, or ``None`` where the system does not know."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory_kb("VmRSS")


def _memory_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _work(job: Job, ffn: DenseFFN, inputs: LayerInputs) -> Callable[[], Carving]:
    def random() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    if job.method == REFIT:
        carving = CARVERS["static"](ffn, inputs, job.shape, random())
        return lambda: refit(ffn, inputs, carving, job.shape.top_k)
    carver = released.carve if job.method == RELEASED else CARVERS[job.method]
    return lambda: carver(ffn, inputs, job.shape, random())


def rows(layer: Path, repeats: int, quick: bool, report: Callable[[str], None]) -> list[Row]:
    """Every method on one layer, for each shape."""
    tensors = torch.load(layer, weights_only=True, mmap=True)
    millions = sum(tensors[name].numel() for name in ("gate_FD", "up_FD", "down_DF")) / 1e6
    found: list[Row] = []
    for shape in SHAPES[:1] if quick else SHAPES[1:]:
        base = 0.0
        for method in (RELEASED, "cmoe") if quick else (RELEASED, *CARVERS, REFIT):
            cost = measure(Job(method=method, layer=layer, shape=shape, repeats=repeats))
            seconds = statistics.median(cost.seconds)
            base = base or seconds
            found.append(
                {
                    "part": "cost",
                    "setting": f"{shape.num_experts} experts: {shape.num_shared} shared + {shape.top_k} of {shape.num_routed}",
                    "method": method,
                    "tokens": len(tensors["x_TD"]),
                    "seconds": round(seconds, 3),
                    "of_released": round(seconds / base, 3),
                    "s_per_mparam": round(seconds / millions, 4),
                    "peak_mb": None if cost.peak_mb is None else round(cost.peak_mb, 1),
                }
            )
            report(f"  {method}: {seconds:.2f} s")
    return found
