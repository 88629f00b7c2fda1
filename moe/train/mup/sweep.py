"""A learning-rate sweep over variants of a recipe: real runs of `moe train`, one after the other, kept in a folder.

A sweep that is started again in its folder goes on where it stopped: finished and diverged runs are read, a broken one is
resumed from its last checkpoint.
"""

import fcntl
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import yaml

from moe.train.config import RunConfig, parse_config
from moe.train.mup.variants import check_values, variant
from moe.train.run_folder import SUMMARY_FILE

PLAN_FILE, LOCK_FILE, DIVERGED_FILE = "sweep.json", ".lock", "diverged.txt"
_USERS_MISTAKE, _TRAINING_FAILED = 2, 3  # exit statuses of `moe train`


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
        check_values(self.axis, self.values, at_least=1)
        names = {_name(lr) for lr in self.learning_rates}
        if any(not 0 < lr < math.inf for lr in self.learning_rates) or len(names) < max(3, len(self.learning_rates)):
            raise ValueError("--lr needs at least three different positive learning rates, such as 1e-3,2e-3,4e-3")


def _name(lr: float) -> str:
    """In the names of runs, which have no plus signs."""
    return f"{lr:g}".replace("+", "")


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
        low, high: the same for each seed alone, smallest and largest. Of S seeds that err to either side alike, the true
            optimum lies between them with a probability of 1 - 2 ** (1 - S); one seed says nothing (both are its own).
        eval_loss: of the parabola there.
        at_edge: whether the best rate is the first or the last one tried, or has a diverged neighbour, so that the optimum
            may lie elsewhere.
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
        ValueError: the recipe holds nothing out, is no recipe that has such variants, or does not train; or the folder
            holds a sweep of another recipe, or one that is running.
        RuntimeError: a run failed; with the end of its output.
    """
    if config.data.eval_fraction == 0:
        raise ValueError("data.eval_fraction=0 holds nothing out, and a sweep compares held-out losses; set it above 0")
    variants = {value: variant(config, options.axis, value) for value in options.values}  # all checked before any runs
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    total = len(options.values) * len(options.learning_rates) * len(options.seeds)
    with _locked(folder) as lock:
        _check_same(config, options, folder)
        report(f"{total} runs in {folder}; those that have ended are read")
        for value, chosen in variants.items():
            recipe = folder / f"{options.axis}-{value}.yaml"
            recipe.write_text(yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
            for lr in options.learning_rates:
                for seed in options.seeds:
                    run_dir = folder / f"{options.axis}-{value}-lr-{_name(lr)}-seed-{seed}"
                    loss = _result(run_dir)
                    if loss is None:
                        loss = _train(recipe, run_dir, lr, seed, lock)
                    done.append(SweepRun(value=value, lr=lr, seed=seed, eval_loss=loss))
                    said = f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"
                    report(f"{len(done)} of {total}: {options.axis} {value}, lr {lr:g}, seed {seed}: {said}")
    return done


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A file descriptor that holds the folder; a run that outlives its sweep inherits it, and holds the folder until it ends."""
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"a sweep or one of its runs is running in {folder}; wait until it has ended") from None
        yield file.fileno()


def _check_same(config: RunConfig, options: SweepOptions, folder: Path) -> None:
    """More values, rates and seeds may be added to a sweep; another recipe may not."""
    plan = {"recipe": _recipe(config), "axis": options.axis}
    file = folder / PLAN_FILE
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved["recipe"] = _recipe(parse_config(saved["recipe"]))  # with the settings that have come since
        if difference := _difference(saved, plan):
            raise ValueError(f"{folder} holds another sweep: {difference}; choose another folder")
    file.write_text(json.dumps(plan, indent=1), encoding="utf-8")


def _recipe(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"name", "seed", "log"})


def _difference(saved: object, ours: object, key: str = "") -> str | None:
    """The first setting in which two plans differ."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        differences = (
            _difference(saved.get(name), ours.get(name), f"{key}.{name}".removeprefix(".").removeprefix("recipe."))
            for name in sorted(saved.keys() | ours.keys())
        )
        return next((difference for difference in differences if difference is not None), None)
    return None if saved == ours else f"{key} is {saved!r} there and {ours!r} here"


def _result(run_dir: Path) -> float | None:
    """The held-out loss of a run that has ended, NaN of one that diverged; None of one that has not."""
    if (run_dir / DIVERGED_FILE).is_file():
        return math.nan
    summary = run_dir / SUMMARY_FILE
    if not summary.is_file():
        return None
    loss = json.loads(summary.read_text(encoding="utf-8"))["eval_loss"]
    return math.nan if loss is None else float(loss)  # JSON has no NaN


def _train(recipe: Path, run_dir: Path, lr: float, seed: int, lock: int) -> float:
    command = [sys.executable, "-m", "moe.cli", "train", str(recipe), f"name={run_dir.name}"]
    command += [f"log.run_root={run_dir.parent}", f"optim.lr={lr}", f"seed={seed}", "log.wandb=off"]
    command += ["train.sample_tokens=0", *(["--resume"] if run_dir.exists() else [])]
    ended = _run(command, lock)
    problem = ended.stderr.rpartition("error: ")[2].strip()
    if ended.returncode == _TRAINING_FAILED and "non-finite" in problem:
        (run_dir / DIVERGED_FILE).write_text(problem, encoding="utf-8")
    elif ended.returncode == _USERS_MISTAKE:
        raise ValueError(problem)
    elif ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    loss = _result(run_dir)
    if loss is None:
        raise RuntimeError(f"a signal stopped {run_dir.name}; start the sweep again to go on")
    return loss


def _run(command: list[str], lock: int) -> "subprocess.CompletedProcess[str]":
    """Run to the end; SIGTERM and Ctrl-C end the run first, which then writes a checkpoint."""
    asked: list[int] = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=(lock,), start_new_session=True
    ) as process:

        def stop(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            process.terminate()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _, stderr = process.communicate()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(command, process.returncode, stderr=stderr)


def mean_loss(runs: list[SweepRun], value: int, lr: float) -> float | None:
    """Held-out loss over the seeds; infinite where one of them diverged, None where there is no such run."""
    losses = [run.eval_loss for run in runs if (run.value, run.lr) == (value, lr)]
    if not losses:
        return None
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def optima(runs: list[SweepRun]) -> list[Optimum]:
    """The best learning rate of each value.

    Raises:
        ValueError: every learning rate diverged for a value.
    """
    found = []
    for value in dict.fromkeys(run.value for run in runs):
        rates = sorted({run.lr for run in runs if run.value == value})
        losses = np.array(
            [[run.eval_loss for run in runs if run.value == value and run.lr == lr] for lr in rates], dtype=np.float64
        )
        losses = np.where(np.isfinite(losses), losses, np.inf)
        mean = losses.mean(1)
        best = int(np.argmin(mean))
        if not math.isfinite(mean[best]):
            raise ValueError(
                f"at {value} a run diverged at every learning rate, the smallest {rates[0]:g}; add smaller ones"
            )
        lr, eval_loss = _minimum(rates, mean)
        of_seeds = [_minimum(rates, column)[0] for column in losses.T]
        inside = 0 < best < len(rates) - 1 and bool(np.isfinite(mean[best - 1 : best + 2]).all())
        found.append(
            Optimum(value=value, lr=lr, low=min(of_seeds), high=max(of_seeds), eval_loss=eval_loss, at_edge=not inside)
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
