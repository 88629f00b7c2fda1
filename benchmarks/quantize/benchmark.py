"""``quantize``: what quantisation costs two real MoE models, which part of EAQuant earns its place, and what servers read.

SmolLM2-135M, carved and upcycled by this project and trained briefly (`benchmarks.quantize.models`), is quantised by the engine of
`moe quantize` and compared with itself before: perplexity on held-out text of the calibration's kind (``ppl_in``) and on other text
(``ppl_out``), both over that of the bf16 weights; KL(bf16 || quantised) in nats per token, the most likely token and the chosen
experts (``same_experts``: mean share of a token's K experts) on the first. All compute in fp32, so what differs is the rounding.

- ``models``: the two models before quantisation: how far apart experts are, how routers choose.
- ``quality``: every scheme by every method that suits it, two seeds of calibration text.
- ``ablation``: EAQuant's smoothing, router alignment and calibration balance, each on and off.
- ``starved``: calibrated while the routers send two experts of each layer less than 1 % of the tokens; evaluated with the model's
  own routing.
- ``export``: folders and files for stock transformers and llama.cpp, whose logits are compared with our simulated ones.

Cells run in processes of one thread each. Finished ones are kept in ``results/quantize.partial.jsonl`` until all are done.
``QUANTIZE_MODELS`` names the folder of the two models; without it they are made anew, in some twenty minutes.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from benchmarks.carve.cells import TEXT
from benchmarks.finished import Finished
from benchmarks.quantize import export
from benchmarks.quantize.cells import CELLS, FULL, PARTS, QUICK, TEXTS, Cell, Size, method_options
from benchmarks.quantize.describe import describe
from benchmarks.quantize.evaluate import Reference
from benchmarks.quantize.models import CARVED, QUICK_VOCAB, UPCYCLED, make_models
from benchmarks.quantize.quantized import Job, calibration, measure, simulate
from benchmarks.quantize.size import megabytes
from benchmarks.record import RESULTS
from benchmarks.routers.protocol import run_all
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.models.calibration_text import read_text, split_text, tokenize
from moe.models.compare import load_folder
from moe.models.evaluate import cut_windows
from moe.models.folder import ModelFolder
from moe.quant.layer import matrices, moe_of
from moe.quant.load import load_simulated
from moe.quant.router import GRID as ROUTER_GRID
from moe.quant.scaling.find import router_matrices
from moe.quant.schemes import Scheme
from moe.quant.simulate import quantize_activations

GATED = ("w8a8", "w4a16", "w4a4", "fp8", "mxfp4")
EXACT_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids to calibrate on, and held-out windows (B, L) of each of `TEXTS`."""

    ids: list[int]
    held_out: list[Tensor]


def read_texts(folder: Path, size: Size, quick: bool) -> Text:
    """The first four fifths of WikiText-2 calibrate; the last fifth of either text evaluates."""
    if quick:
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(QUICK_VOCAB, (2048,), generator=random).tolist()
        return Text(ids=ids, held_out=[cut_windows(ids[1024:], size.window, count) for count in size.windows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    halves = [[tokenize(tokenizer, part) for part in split_text(read_text(TEXT / name))] for name in TEXTS]
    held_out = [
        cut_windows(evaluation, size.window, count) for (_, evaluation), count in zip(halves, size.windows, strict=True)
    ]
    return Text(ids=halves[0][0], held_out=held_out)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all parts share: folders of the models, text, and room for what is written."""

    folders: dict[str, Path]
    text: Text
    size: Size
    scratch: Path


def models_rows(setting: Setting, options: Options, finished: Finished) -> list[Row]:
    """Part ``models``."""
    rows: list[Row] = []
    for name, folder in setting.folders.items():
        found = describe(load_folder(folder, torch.float32), setting.text.held_out[0])
        config = ModelFolder(folder).config
        row: Row = {"part": "models", "model": name, "mb": round(megabytes(config, None), 1)}
        row |= {key: round(value, 4) for key, value in dataclasses.asdict(found).items()}
        row["ppl_in"] = row.pop("perplexity")
        rows.append(row)
        options.report(f"{name}: {row}")
    return rows


def cell_rows(
    cells_of: Callable[[bool], list[Cell]], setting: Setting, options: Options, finished: Finished
) -> list[Row]:
    """Rows of a part that is made of cells."""
    cells = cells_of(options.quick)
    for name, folder in setting.folders.items():
        missing = [cell for cell in cells if cell.model == name and cell.key not in finished.rows]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(dir=setting.scratch) as scratch:
            references = []
            for index, windows_BL in enumerate(setting.text.held_out):
                (place := Path(scratch) / f"text{index}").mkdir()
                references.append(Reference(folder, windows_BL, place))
            options.report(f"{name}: perplexities in bf16 " + ", ".join(f"{one.perplexity:.3f}" for one in references))
            jobs = [
                Job(
                    cell=cell,
                    source=folder,
                    ids=setting.text.ids,
                    references=references,
                    size=setting.size,
                    scratch=Path(scratch),
                )
                for cell in missing
            ]

            def keep(result: tuple[str, Row]) -> str:
                finished.add(*result)
                key, row = result
                return f"{key}: {row['of_bf16']} of the perplexity, KL {row['kl']}, {row['seconds']} s"

            run_all(measure, jobs, options, keep)
    return [finished.rows[cell.key] for cell in cells if cell.key in finished.rows]


def export_rows(setting: Setting, options: Options, finished: Finished) -> list[Row]:
    """Part ``export``."""
    calibration_BL, reserve_BL = calibration(setting.text.ids, setting.size, 0)
    return export.rows(setting.folders, calibration_BL, reserve_BL, setting.text.held_out[1], options)


ROWS: dict[str, Callable[[Setting, Options, Finished], list[Row]]] = {
    "models": models_rows,
    **{part: partial(cell_rows, cells_of) for part, cells_of in CELLS.items()},
    "export": export_rows,
}


def run(options: Options) -> list[Row]:
    """Measure; see the module."""
    hf_logging.disable_progress_bar()
    finished = Finished(None if options.quick else RESULTS / "quantize.partial.jsonl")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        setting = set_up(Path(name), options)
        for part, rows_of in ROWS.items():
            if options.part in (None, part):
                rows += rows_of(setting, options, finished)
    if options.part is None:
        finished.remove()
    return rows


def set_up(scratch: Path, options: Options) -> Setting:
    """Models and texts."""
    size = QUICK if options.quick else FULL
    kept = None if options.quick else os.environ.get("QUANTIZE_MODELS")
    out = scratch / "models" if kept is None else Path(kept)
    out.mkdir(parents=True, exist_ok=True)
    folders = make_models(out, options.quick, (CARVED, UPCYCLED), options.report)
    text = read_texts(folders[CARVED], size, options.quick)
    return Setting(folders=folders, text=text, size=size, scratch=scratch)


def gate(options: Options) -> list[Check]:
    """Plain rounding by the engine, written and read again, is rounding of every matrix in memory: logits of tiny models."""
    hf_logging.disable_progress_bar()
    quick, checks = dataclasses.replace(options, quick=True), []
    with tempfile.TemporaryDirectory() as name:
        setting = set_up(Path(name), quick)
        for model_name, folder in setting.folders.items():
            ids_BL, (calibration_BL, _) = setting.text.held_out[0], calibration(setting.text.ids, setting.size, 0)
            for scheme in GATED:
                told = method_options(scheme, "rtn", 0)
                model: Any = load_folder(folder, torch.float32)
                round_in_memory(model, told.resolved())
                out = setting.scratch / f"{model_name}-{scheme}"
                simulate(folder, out, told, calibration_BL)
                with torch.no_grad():
                    got, expected = (one(input_ids=ids_BL).logits for one in (load_simulated(out), model))
                error = (got - expected).abs().max().item()
                checks.append(Check(name=f"{model_name}, {scheme}: logits", error=error, limit=EXACT_LIMIT))
    return checks


@torch.no_grad()
def round_in_memory(model: Any, scheme: Scheme) -> None:
    """Round the weights of every layer to nearest, the router's where the scheme does, and let it round its activations."""
    for layer in model.model.layers:
        if scheme.rounds_router and (moe := moe_of(layer)) is not None:
            for weight in router_matrices(moe.router).values():
                weight.data.copy_(ROUTER_GRID.nearest(weight.data).dequantize())
        for matrix in matrices(layer):
            matrix.weight_PQ.copy_(scheme.weights.nearest(matrix.weight_PQ, torch.bfloat16).dequantize())
        quantize_activations(layer, scheme.activations)


COLUMNS = (
    *("part", "model", "scheme", "group", "method", "container", "server", "seed", *PARTS, "calibration"),
    *("starved_share", "ppl_in", "of_bf16", "ppl_out", "out_of_bf16", "kl", "same_top1", "same_experts", "same_set"),
    *("max_diff", "logit_rms", "mb", "params", "finite", "seconds"),
    *("expert_distance", "output_distance", "entropy", "load_least", "load_most"),
)
BENCHMARK = Benchmark(
    name="quantize",
    description="perplexity, KL, router agreement and size of quantised MoE models by scheme and method; ablations and exports",
    columns=COLUMNS,
    table=COLUMNS[1:],
    gate=gate,
    run=run,
    parts=tuple(ROWS),
)
