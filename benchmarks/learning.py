"""``learning``: the default recipe against a dense model of the same active parameters, tokens and steps.

Both recipes get the same grid of learning rates with the first seed; each is then run with all seeds at its own best one. The
real command runs; the rows are held-out losses, their mean and their spread.
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
LEARNING_RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
SHOWN = ("eval_loss", "perplexity", "steps", "tokens", "active_params", "total_params")


def _config(recipe: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{recipe}.yaml")


def gate(options: Options) -> list[Check]:
    """The recipes differ in the experts, in how they are spread and in the learning rate, and in nothing else."""
    moe, dense = (_config(recipe).model_dump() for recipe in RECIPES)
    for config in (moe, dense):
        config["optim"].pop("lr")
    same = all(moe[key] == dense[key] for key in ("seed", "model", "data", "optim", "train"))
    return [Check(name="recipes differ beyond the experts", error=float(not same), limit=0.0)]


def _train(recipe: str, seed: int, lr: float, folder: Path, options: Options) -> Row:
    overrides = [f"seed={seed}", f"optim.lr={lr}", f"name={recipe}-{seed}-{lr}", f"log.run_root={folder}"]
    overrides += ["log.wandb=off"]
    if options.quick:
        overrides += ["train.steps=3", "optim.warmup_steps=1", "train.eval_windows=4", "train.sample_tokens=0"]
    command = [sys.executable, "-m", "moe.cli", "train", str(ROOT / "configs" / f"{recipe}.yaml"), *overrides, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads(done.stdout)
    row: Row = {"part": "run", "recipe": recipe, "seed": seed, "lr": lr, **{key: summary[key] for key in SHOWN}}
    options.report(
        f"{recipe} seed {seed} lr {lr}: held-out loss {summary['eval_loss']:.4f}, {summary['seconds']:.0f} s"
    )
    return row


def run(options: Options) -> list[Row]:
    """One row per run, then one per recipe with means, and one with the differences of the pairs of equal seed."""
    seeds = SEEDS[:2] if options.quick else SEEDS
    rates = LEARNING_RATES[:1] if options.quick else LEARNING_RATES
    rows: list[Row] = []
    own: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            grid = [_train(recipe, seeds[0], lr, Path(folder), options) for lr in rates]
            best = min(grid, key=_loss)
            own[recipe] = [
                best,
                *(_train(recipe, seed, float(best["lr"] or 0), Path(folder), options) for seed in seeds[1:]),
            ]
            rows += [*grid, *own[recipe][1:]]
    means: list[Row] = []
    for recipe, runs in own.items():
        mean: Row = {key: runs[0][key] for key in ("lr", *SHOWN)}
        mean |= {
            key: round(statistics.mean(float(row[key] or 0) for row in runs), 4) for key in ("eval_loss", "perplexity")
        }
        means.append({"part": "mean", "recipe": recipe, **mean, "spread": _spread([_loss(row) for row in runs])})
    gaps = [_loss(moe) - _loss(dense) for moe, dense in zip(*own.values(), strict=True)]
    gap: Row = {"eval_loss": round(statistics.mean(gaps), 4), "spread": _spread(gaps)}
    return [*rows, *means, {"part": "mean", "recipe": f"{RECIPES[0]} minus {RECIPES[1]}", **gap}]


def _loss(row: Row) -> float:
    return float(row["eval_loss"] or 0)


def _spread(values: list[float]) -> float:
    return round(statistics.stdev(values), 4)


BENCHMARK = Benchmark(
    name="learning",
    description="held-out loss of the default recipe against a dense one of the same active parameters, tuned alike, 3 seeds",
    columns=("part", "recipe", "seed", "lr", "spread", *SHOWN),
    table=(
        "recipe",
        "seed",
        "lr",
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
