"""``carve``: how much of a real model's quality each carving method keeps, without training, and what it costs.

Part ``quality``: SmolLM2-135M is carved by every method at three shapes, and perplexities are taken on held-out text like the
calibration's (``ppl_in``) and on other text (``ppl_out``). The row "static" prunes the same neurons for every token: a carving
whose routing is worth something beats it at the same refit. "cmoe, as released" has the released code's tokens (16k) and its
sequential calibration. Finished cells are kept in ``results/carve.partial.jsonl`` until all are done: a run that was stopped goes
on where it was. ``seconds`` are of all layers, calibration apart.

Part ``cost``: one layer, 16k tokens, each method in a process of its own, and the steps of CMoE's released code for comparison.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.carve import cost, released
from benchmarks.carve.cells import CALIBRATIONS, FULL, IN_DOMAIN, OUT_OF_DOMAIN, QUICK, TEXT, Cell, Size, cells
from benchmarks.carve.quality import Evaluation, Texts, carve_together, ffn_parameters, released_windows, row_of
from benchmarks.finished import Finished
from benchmarks.record import RESULTS
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.convert.carve import CARVERS, cmoe
from moe.convert.carve.calibrate import CalibrationWalk
from moe.convert.carve.neurons import output
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import carve, in_fp32
from moe.convert.carve.types import CarveShape, Carving, LayerInputs
from moe.convert.demo import write_demo
from moe.convert.dense import DenseFFN, read_ffn
from moe.models.calibration_text import choose_windows, read_text, split_text, tokenize
from moe.models.evaluate import cut_windows
from moe.models.folder import ModelFolder

EXACT_LIMIT = 1e-4
DENSE = "dense"
QUICK_VOCAB = 96  # of the tiny model


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=QUICK_VOCAB,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def gate(options: Options) -> list[Check]:
    """With every expert running a carved model is the dense one; our CMoE groups as well as the released code's steps."""
    hf_logging.disable_progress_bar()
    checks = []
    everything = CarveShape(num_experts=8, num_shared=2, top_k=6)
    with tempfile.TemporaryDirectory() as name:
        source = ModelFolder(tiny_model(Path(name) / "dense"))
        windows_BL = torch.randint(QUICK_VOCAB, (8, 32))
        for method in CARVERS:
            carved = carve(
                source,
                Path(name) / method,
                windows_BL,
                CarveOptions(shape=everything, method=method),
                check_BL=windows_BL,
            )
            assert carved.comparison is not None
            error = carved.comparison.max_diff
            checks.append(Check(name=f"{method}, all experts: logits", error=error, limit=EXACT_LIMIT))
        walk, ffn = CalibrationWalk(source, windows_BL), in_fp32(read_ffn(source, 0))
        inputs = walk.enter(lambda x_TD: output(ffn, x_TD))
        shape = CarveShape(num_experts=8, num_shared=2, top_k=2)
        ours, theirs = (c.carve(ffn, inputs, shape, torch.Generator()) for c in (cmoe, released))
        shared = set(ours.shared_M.tolist()) ^ set(theirs.shared_M.tolist())
        checks.append(Check(name="cmoe: other shared neurons than the released steps'", error=len(shared), limit=0.0))
        distances = [_distance(ffn, inputs, carving) for carving in (ours, theirs)]
        checks.append(
            Check(name="cmoe: distance above the released steps'", error=distances[0] - distances[1], limit=0.0)
        )
    return checks


def _distance(ffn: DenseFFN, inputs: LayerInputs, carving: Carving) -> float:
    """Sum of Hamming distances between the marks of neurons and of their experts' seeds; what the assignment minimises."""
    assert ffn.gate_FD is not None
    unit = DenseFFN(gate_FD=normalize(ffn.gate_FD), up_FD=normalize(ffn.up_FD), down_DF=ffn.down_DF)
    marks_TA = cmoe.mark(unit, inputs.x_TD)
    marks_TF = torch.zeros(len(marks_TA), ffn.width).scatter_(1, marks_TA, 1.0)
    num_shared, num_routed = len(carving.shared_M), len(carving.routed_RM)
    seeds_R = marks_TF.sum(0).argsort(descending=True, stable=True)[num_shared : num_shared + num_routed]
    return float((marks_TF[:, carving.routed_RM] - marks_TF[:, seeds_R, None]).abs().sum())


def _texts(folder: Path, size: Size, quick: bool) -> Texts:
    if quick:
        random = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(QUICK_VOCAB, (size.tokens // size.window, size.window), generator=random)
        return Texts(calibration_BL=lambda kind, seed: ids_BL, in_BL=ids_BL[:2], out_BL=ids_BL[:2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    halves = {name: split_text(read_text(TEXT / name)) for name in (IN_DOMAIN, OUT_OF_DOMAIN)}
    ids = {name: [tokenize(tokenizer, part) for part in parts] for name, parts in halves.items()}

    def calibration(kind: str, seed: int) -> torch.Tensor:
        parts = [ids[name][0] for name in CALIBRATIONS[kind]]
        windows_BL = choose_windows(parts, size.tokens, size.window, torch.Generator().manual_seed(seed))
        return windows_BL[torch.randperm(len(windows_BL), generator=torch.Generator().manual_seed(seed))]

    return Texts(
        calibration_BL=calibration,
        in_BL=cut_windows(ids[IN_DOMAIN][1], size.window, size.windows_in),
        out_BL=cut_windows(ids[OUT_OF_DOMAIN][1], size.window, size.windows_out),
    )


def _quality(source: ModelFolder, options: Options, finished: Finished) -> list[Row]:
    size = QUICK if options.quick else FULL
    texts = _texts(source.path, size, options.quick)
    wanted = cells(options.quick)
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in wanted:
        if cell.key not in finished.rows:
            alone = cell.key if cell.released else ""
            groups.setdefault((cell.calibration, cell.options.seed, alone, cell.setting), []).append(cell)
    evaluation = Evaluation(source.path, texts)
    for (calibration, seed, _, setting), group in groups.items():
        windows_BL = texts.calibration_BL(str(calibration), int(str(seed)))
        if group[0].released:
            windows_BL = released_windows(windows_BL, size)
        options.report(f"{setting}, {calibration}, seed {seed}: {', '.join(cell.label for cell in group)}")
        for cell, made in zip(group, carve_together(source, windows_BL, group, options.report), strict=True):
            found = evaluation(made.layers)
            made.layers.clear()
            finished.add(
                cell.key, row_of(cell, made, found, evaluation.dense, windows_BL.numel(), ffn_parameters(source))
            )
            options.report(f"  {cell.key}: perplexity {found[0]:.2f}, {found[1]:.2f} on other text")
    dense: Row = {
        "part": "quality",
        "method": DENSE,
        "active": "100%",
        "ppl_in": round(evaluation.dense[0], 3),
        "ppl_out": round(evaluation.dense[1], 3),
    }
    return [dense, *(finished.rows[cell.key] for cell in wanted)]


def _cost(source: ModelFolder, options: Options, folder: Path) -> list[Row]:
    size = QUICK if options.quick else FULL
    windows_BL = released_windows(_texts(source.path, size, options.quick).calibration_BL("in-domain", 0), size)
    walk = CalibrationWalk(source, windows_BL)
    for layer in range(walk.num_layers // 2 + 1):
        if layer:
            walk.leave()
        ffn = in_fp32(read_ffn(source, layer))
        inputs = walk.enter(lambda x_TD, ffn=ffn: output(ffn, x_TD))
    cost.save_layer(ffn, inputs, folder / "layer.pt")
    return cost.rows(folder / "layer.pt", min(options.repeats, 3), options.quick, options.report)


def run(options: Options) -> list[Row]:
    """Measure; see the module."""
    hf_logging.disable_progress_bar()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = tiny_model if options.quick else write_demo
        source = ModelFolder(make(folder / "dense"))
        if options.part in (None, "cost"):
            rows += _cost(source, options, folder)
        if options.part in (None, "quality"):
            partial = None if options.quick else RESULTS / "carve.partial.jsonl"
            finished = Finished(partial)
            rows += _quality(source, options, finished)
            finished.remove()
    return rows


COLUMNS = (
    "part",
    "setting",
    "active",
    "method",
    "calibration",
    "tokens",
    "seed",
    "ppl_in",
    "ppl_in_of_dense",
    "ppl_out",
    "ppl_out_of_dense",
    "energy_kept",
    "recall",
    "seconds",
    "s_per_mparam",
    "of_released",
    "peak_mb",
)
BENCHMARK = Benchmark(
    name="carve",
    description="perplexity, time and memory of carving methods on SmolLM2-135M, and of CMoE's released steps",
    columns=COLUMNS,
    table=COLUMNS[1:],
    gate=gate,
    run=run,
    parts=("quality", "cost"),
)
