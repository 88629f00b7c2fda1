"""A learning-rate sweep over variants of a recipe: real runs of `moe train`, one after the other, kept in a folder.

A sweep that is started again in its folder goes on where it stopped: finished runs are read, a broken one is resumed.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from moe.train.config import RunConfig
from moe.train.mup.variants import variant
from moe.train.run_folder import SUMMARY_FILE

PLAN_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What to run.

    Attributes:
        axis: key of `AXES`.
        values: places on it.
        learning_rates: peak rates, each for every value.
        seeds: of the initial weights.
    """

    axis: str
    values: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.learning_rates) < 3:
            raise ValueError("--lr needs at least three learning rates, such as 1e-3,2e-3,4e-3")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run.

    Attributes:
        value: place on the axis.
        lr: peak learning rate.
        seed: of the initial weights.
        eval_loss: held-out loss at the end; NaN where the run diverged.
    """

    value: int
    lr: float
    seed: int
    eval_loss: float


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of one value.

    Attributes:
        value: place on the axis.
        lr: at the minimum of the parabola through the best rate and its neighbours, of the losses' means over seeds.
        low, high: the same for each seed alone, smallest and largest.
        eval_loss: of the parabola there.
        at_edge: whether the best rate is the first or the last one tried, so that the optimum may lie beyond.
    """

    value: int
    lr: float
    low: float
    high: float
    eval_loss: float
    at_edge: bool


def run_sweep(config: RunConfig, options: SweepOptions, folder: Path, report: Callable[[str], None]) -> list[SweepRun]:
    """Run what is not finished yet.

    Raises:
        ValueError: the folder holds a sweep of another recipe.
        RuntimeError: a run failed; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(config, options, folder)
    done = []
    total = len(options.values) * len(options.learning_rates) * len(options.seeds)
    for value in options.values:
        recipe = folder / f"{options.axis}-{value}.yaml"
        values = variant(config, options.axis, value).model_dump(mode="json")
        recipe.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        for lr in options.learning_rates:
            for seed in options.seeds:
                found = _run(recipe, f"{options.axis}-{value}-lr-{lr:g}-seed-{seed}", lr, seed, folder)
                done.append(SweepRun(value=value, lr=lr, seed=seed, eval_loss=found))
                report(f"{len(done)} of {total}: {options.axis} {value}, lr {lr:g}, seed {seed}: loss {found:.4f}")
    return done


def _check_same(config: RunConfig, options: SweepOptions, folder: Path) -> None:
    """More values, rates and seeds may be added to a sweep; another recipe may not."""
    plan = {"recipe": config.model_dump(mode="json", exclude={"name", "seed", "log"}), "axis": options.axis}
    file = folder / PLAN_FILE
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != plan:
        raise ValueError(f"{folder} holds a sweep of another recipe or axis; choose another folder")
    file.write_text(json.dumps(plan, indent=1), encoding="utf-8")


def _run(recipe: Path, name: str, lr: float, seed: int, folder: Path) -> float:
    summary = folder / name / SUMMARY_FILE
    if not summary.is_file():
        command = [sys.executable, "-m", "moe.cli", "train", str(recipe), f"name={name}", f"log.run_root={folder}"]
        command += [f"optim.lr={lr}", f"seed={seed}", "log.wandb=off", "train.sample_tokens=0"]
        command += ["--resume"] if (folder / name).exists() else []
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode and "non-finite" in ended.stderr:
            return math.nan
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    loss = json.loads(summary.read_text(encoding="utf-8"))["eval_loss"]
    return math.nan if loss is None else float(loss)


def optima(runs: list[SweepRun]) -> list[Optimum]:
    """The best learning rate of each value."""
    found = []
    for value in dict.fromkeys(run.value for run in runs):
        rates = sorted({run.lr for run in runs if run.value == value})
        losses = np.array(
            [[run.eval_loss for run in runs if run.value == value and run.lr == lr] for lr in rates], dtype=np.float64
        )
        losses = np.where(np.isfinite(losses), losses, np.inf)
        mean, of_seeds = _minimum(rates, losses.mean(1)), [_minimum(rates, column) for column in losses.T]
        best = int(np.argmin(losses.mean(1)))
        found.append(
            Optimum(
                value=value,
                lr=mean[0],
                low=min(lr for lr, _ in of_seeds),
                high=max(lr for lr, _ in of_seeds),
                eval_loss=mean[1],
                at_edge=best in (0, len(rates) - 1),
            )
        )
    return found


def _minimum(rates: list[float], losses: np.ndarray) -> tuple[float, float]:
    """Rate and loss at the minimum of the parabola, in the logarithm of the rate, through the best rate and its neighbours."""
    best = int(np.argmin(losses))
    around = slice(best - 1, best + 2)
    if best in (0, len(rates) - 1) or not np.isfinite(losses[around]).all():
        return rates[best], float(losses[best])
    x = np.log(rates[around])
    a, b, c = np.polyfit(x - x[1], losses[around], 2)
    if a <= 0:
        return rates[best], float(losses[best])
    at = -b / (2 * a)
    return float(np.exp(x[1] + at)), float(c - b * b / (4 * a))


def shift(found: list[Optimum]) -> float:
    """Largest optimum over the smallest."""
    return max(each.lr for each in found) / min(each.lr for each in found)
