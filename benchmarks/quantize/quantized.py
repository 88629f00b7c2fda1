"""One cell: quantises a model with the engine of `moe quantize`, loads what was written, and measures it."""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantize.cells import PARTS, Cell, Size
from benchmarks.quantize.evaluate import Reference
from benchmarks.quantize.size import megabytes
from benchmarks.quantize.starve import restore_routing, write_starved
from benchmarks.spec import Row
from moe.models.calibration_text import choose_windows
from moe.models.folder import ModelFolder
from moe.quant.load import load_simulated
from moe.quant.options import QuantOptions
from moe.quant.plan import make_plan
from moe.quant.report import QuantReport
from moe.quant.run import CalibrationText, quantize
from moe.quant.schemes import SIMULATED


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker process needs to make a row.

    Attributes:
        cell: what to quantise and how.
        source: folder of the model.
        ids: token ids of the calibration text.
        references: the model on each of the evaluated texts.
        size: how much text.
        scratch: a folder for what it writes.
    """

    cell: Cell
    source: Path
    ids: list[int]
    references: list[Reference]
    size: Size
    scratch: Path


def calibration(ids: list[int], size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and those of the reserve."""
    random = torch.Generator().manual_seed(seed)
    windows_BL = choose_windows([ids], size.tokens + size.reserve, size.window, random)
    shuffled_BL = windows_BL[torch.randperm(len(windows_BL), generator=random)]
    return shuffled_BL[: size.tokens // size.window], shuffled_BL[size.tokens // size.window :]


def simulate(
    source: Path, out: Path, options: QuantOptions, calibration_BL: Tensor, reserve_BL: Tensor | None = None
) -> QuantReport:
    """Quantise a model in our format to the form that any scheme has; the reserve is for options that balance."""
    plan = make_plan(ModelFolder(source), options, to="moe", container=SIMULATED)
    text = CalibrationText(windows_BL=calibration_BL, reserve_BL=reserve_BL if options.balance else None)
    return quantize(plan, out, text)


def measure(job: Job) -> tuple[str, Row]:
    """The cell's key and row."""
    cell = job.cell
    calibration_BL, reserve_BL = calibration(job.ids, job.size, cell.options.seed)
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        source, out, share = job.source, Path(folder) / "quantized", None
        if cell.starved:
            source = Path(folder) / "starved"
            share = write_starved(job.source, source, calibration_BL)
        start = time.perf_counter()
        simulate(source, out, cell.options, calibration_BL, reserve_BL)
        seconds = time.perf_counter() - start
        model: Any = load_simulated(out)
        if cell.starved:
            restore_routing(model, job.source)
        found = [reference.compare(model) for reference in job.references]
    return cell.key, row_of(job, [dataclasses.asdict(one) for one in found], seconds, share)


def row_of(job: Job, found: list[dict[str, Any]], seconds: float, starved_share: float | None) -> Row:
    """A finished cell."""
    cell, (inside, outside) = job.cell, found
    scheme = cell.options.resolved()
    config = ModelFolder(job.source).config
    row: Row = {
        "part": cell.part,
        "model": cell.model,
        "scheme": scheme.name,
        "group": scheme.weights.group_size or "row",
        "method": cell.method,
        "seed": cell.options.seed,
        "ppl_in": round(inside["perplexity"], 3),
        "of_bf16": round(inside["of_reference"], 4),
        "ppl_out": round(outside["perplexity"], 3),
        "out_of_bf16": round(outside["of_reference"], 4),
        "kl": round(inside["kl"], 5),
        "same_top1": round(inside["same_top1"], 4),
        "same_experts": round(inside["same_experts"], 4),
        "same_set": round(inside["same_set"], 4),
        "mb": round(megabytes(config, cell.options), 1),
        "finite": int(all(one["finite"] for one in found)),
        "seconds": round(seconds, 1),
    }
    if cell.part == "ablation":
        row |= {name: "x" if name in cell.parts else "-" for name in PARTS}
    if cell.part == "starved":
        row["calibration"] = "starved" if cell.starved else "ordinary"
        row["starved_share"] = None if starved_share is None else round(starved_share, 4)
    return row
