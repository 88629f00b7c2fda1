"""``mup-transfer``: where the best learning rate is over widths and numbers of experts, under muP and under standard.

Real runs of the default recipe's shape on the embedded text, at least seven learning rates and two seeds each. Runs are kept in
``MUP_TRANSFER_RUNS`` (a temporary folder by default): started again there, it goes on where it stopped.
"""

import os
import tempfile
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.train.config import load_config
from moe.train.mup.render import draw_sweeps
from moe.train.mup.sweep import SweepOptions, SweepRun, optima, run_sweep, shift

RESULTS = Path(__file__).parent / "results"
RECIPE = ROOT / "configs" / "tiny-mup.yaml"
BASE = "{hidden_size: 64, intermediate_size: 192, num_attention_heads: 2}"
SETTINGS = [
    "model.decoder.hidden_size=64",
    "model.decoder.intermediate_size=192",
    "model.decoder.num_attention_heads=2",
    "model.decoder.num_key_value_heads=1",
    "model.decoder.num_hidden_layers=2",
    "moe.num_experts=8",
    "moe.granularity=2",
    "moe.num_shared_experts=0",
    "moe.router={name: topk, top_k: 2}",
    "data.seq_len=128",
    "data.tokenizer.vocab_size=1024",
    "optim.schedule=cosine",
    "train.steps=150",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "train.eval_every=0",
    "train.eval_windows=64",
    "train.checkpoint_every=0",
    "parallel.processes=1",
    "parallel.ep_size=1",
    "parallel.zero_stage=0",
]
RATES = tuple(1e-3 * 2**power for power in range(7))
AXES = {"width": (64, 128, 256, 512), "experts": (4, 8, 16, 32), "granularity": (1, 2, 4)}
PARAMETRIZATIONS = {
    "mup": f"parametrization={{name: mup, base: {BASE}}}",
    "standard": "parametrization={name: standard}",
}


def gate(options: Options) -> list[Check]:
    """The two recipes differ in the parametrization alone."""
    recipes = [load_config(RECIPE, [*SETTINGS, setting]).model_dump() for setting in PARAMETRIZATIONS.values()]
    for recipe in recipes:
        recipe.pop("parametrization")
    return [Check(name="recipes differ beyond the parametrization", error=float(recipes[0] != recipes[1]), limit=0.0)]


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(os.environ.get("MUP_TRANSFER_RUNS", scratch))
        for part, values in AXES.items():
            if options.part not in (None, part):
                continue
            sweeps: dict[str, list[SweepRun]] = {}
            for name in PARAMETRIZATIONS if part == "width" else ("mup",):
                sweeps[name] = _sweep(name, part, values, folder, options)
                rows += _rows(sweeps[name], name, part)
            if not options.quick:
                draw_sweeps(sweeps, part, RESULTS / f"mup-transfer-{part}.png")
    return rows


def _sweep(name: str, part: str, values: tuple[int, ...], folder: Path, options: Options) -> list[SweepRun]:
    settings = [*SETTINGS, PARAMETRIZATIONS[name]]
    if part == "granularity":  # from one wide expert per token
        settings += ["moe.granularity=1", "moe.router={name: topk, top_k: 2}"]
    if options.quick:
        settings += ["train.steps=3", "optim.warmup_steps=1", "train.eval_windows=2"]
    asked = SweepOptions(
        axis=part,
        values=values[:2] if options.quick else values,
        learning_rates=RATES[:3] if options.quick else RATES,
        seeds=(0,) if options.quick else (0, 1),
    )
    config = load_config(RECIPE, settings)
    return run_sweep(config, asked, folder / f"{part}-{name}", lambda line: options.report(f"{name}: {line}"))


def _rows(runs: list[SweepRun], name: str, part: str) -> list[Row]:
    common: Row = {"part": part, "parametrization": name}
    rows: list[Row] = [
        {
            **common,
            "kind": "run",
            "value": run.value,
            "lr": run.lr,
            "seed": run.seed,
            "eval_loss": round(run.eval_loss, 4),
        }
        for run in runs
    ]
    found = optima(runs)
    rows += [
        {
            **common,
            "kind": "best",
            "value": best.value,
            "lr": round(best.lr, 6),
            "lr_low": round(best.low, 6),
            "lr_high": round(best.high, 6),
            "eval_loss": round(best.eval_loss, 4),
            "at_edge": int(best.at_edge),
        }
        for best in found
    ]
    rows.append({**common, "kind": "moves by", "factor": round(shift(found), 2)})
    return rows


BENCHMARK = Benchmark(
    name="mup-transfer",
    description="the best learning rate over widths 64 to 512 (muP and standard), experts 4 to 32 and granularity 1 to 4, 2 seeds",
    columns=(
        "part",
        "parametrization",
        "kind",
        "value",
        "seed",
        "lr",
        "lr_low",
        "lr_high",
        "eval_loss",
        "at_edge",
        "factor",
    ),
    table=("part", "parametrization", "kind", "value", "lr", "lr_low", "lr_high", "eval_loss", "at_edge", "factor"),
    gate=gate,
    run=run,
    parts=tuple(AXES),
)
