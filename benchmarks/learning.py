"""``learning``: the default recipe against a dense model of the same active parameters, tokens, steps and optimizer.

Runs the real command on both recipes with three seeds each and reports the held-out loss, its mean and its spread.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.train.config import RunConfig, load_config

RECIPES = ("tiny", "tiny-dense")
SEEDS = (0, 1, 2)
SHOWN = ("eval_loss", "perplexity", "steps", "tokens", "active_params", "total_params")


def _config(recipe: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{recipe}.yaml")


def gate(options: Options) -> list[Check]:
    """The recipes differ in the experts and in how they are spread, and in nothing else."""
    moe, dense = (_config(recipe).model_dump() for recipe in RECIPES)
    same = all(moe[key] == dense[key] for key in ("seed", "model", "data", "optim", "train"))
    return [Check(name="recipes differ beyond the experts", error=float(not same), limit=0.0)]


def _train(recipe: str, seed: int, folder: Path, options: Options) -> Row:
    overrides = [f"seed={seed}", f"name={recipe}-{seed}", f"log.run_root={folder}", "log.wandb=off"]
    if options.quick:
        overrides += ["train.steps=3", "optim.warmup_steps=1", "train.eval_windows=4", "train.sample_tokens=0"]
    command = [sys.executable, "-m", "moe.cli", "train", str(ROOT / "configs" / f"{recipe}.yaml"), *overrides, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads(done.stdout)
    row: Row = {"part": "run", "recipe": recipe, "seed": seed, **{key: summary[key] for key in SHOWN}}
    options.report(f"{recipe} seed {seed}: held-out loss {summary['eval_loss']:.4f}, {summary['seconds']:.0f} s")
    return row


def run(options: Options) -> list[Row]:
    """One row per run, then one per recipe with means, and one with the differences of the pairs of equal seed."""
    seeds = SEEDS[:2] if options.quick else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        rows = [_train(recipe, seed, Path(folder), options) for seed in seeds for recipe in RECIPES]
    losses = {recipe: [float(row["eval_loss"] or 0) for row in rows if row["recipe"] == recipe] for recipe in RECIPES}
    means: list[Row] = []
    for recipe in RECIPES:
        own = [row for row in rows if row["recipe"] == recipe]
        mean: Row = {key: own[0][key] for key in SHOWN}
        mean |= {
            key: round(statistics.mean(float(row[key] or 0) for row in own), 4) for key in ("eval_loss", "perplexity")
        }
        means.append({"part": "mean", "recipe": recipe, **mean, "spread": round(statistics.stdev(losses[recipe]), 4)})
    gaps = [moe - dense for moe, dense in zip(*losses.values(), strict=True)]
    gap: Row = {"eval_loss": round(statistics.mean(gaps), 4), "spread": round(statistics.stdev(gaps), 4)}
    return [*rows, *means, {"part": "mean", "recipe": f"{RECIPES[0]} minus {RECIPES[1]}", **gap}]


BENCHMARK = Benchmark(
    name="learning",
    description="held-out loss of the default recipe against a dense model of the same active parameters, 3 seeds",
    columns=("part", "recipe", "seed", "spread", *SHOWN),
    table=(
        "recipe",
        "seed",
        "eval_loss",
        "spread",
        "perplexity",
        "steps",
        "tokens",
        "active_params",
        "total_params",
    ),
    gate=gate,
    run=run,
)
