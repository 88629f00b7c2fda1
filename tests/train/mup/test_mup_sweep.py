"""The sweep: optima of losses whose optimum is known, what is kept in its folder, and real runs that are killed."""

import fcntl
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import Command, children, run_moe, write_recipe

from moe.train.config import RunConfig, load_config
from moe.train.metrics import read_metrics
from moe.train.mup import sweep
from moe.train.mup.sweep import SweepOptions, SweepRun, optima, run_sweep, shift

RATES = tuple(1e-3 * 2**power for power in range(7))
OPTIONS = SweepOptions(axis="width", values=(32, 64), learning_rates=(1e-3, 2e-3, 4e-3), seeds=(0, 1))
MUP = "parametrization={name: mup, base: {hidden_size: 32, intermediate_size: 64, num_attention_heads: 2}}"


def runs_of(
    best: float, seeds: int = 2, noise: float = 0.0, value: int = 64, rng: np.random.Generator | None = None
) -> list[SweepRun]:
    """Losses along a parabola in log lr whose minimum, 2.5, is at ``best``; each seed has its own best rate."""
    rng = rng or np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        at = math.log(best) + noise * rng.standard_normal()
        losses = [2.5 + 0.1 * (math.log(lr) - at) ** 2 for lr in RATES]
        found += [
            SweepRun(value=value, lr=lr, seed=seed, eval_loss=loss) for lr, loss in zip(RATES, losses, strict=True)
        ]
    return found


@pytest.mark.parametrize("best", [3e-3, 8e-3, 1.3e-2])
def test_the_optimum_of_a_parabola_is_exact(best: float) -> None:
    (found,) = optima(runs_of(best))
    assert found.lr == pytest.approx(best, rel=1e-9)
    assert found.low == found.high == pytest.approx(best, rel=1e-9)
    assert found.eval_loss == pytest.approx(2.5)
    assert not found.at_edge


@pytest.mark.parametrize(("seeds", "coverage"), [(2, 0.5), (4, 0.875)])
def test_seeds_bound_the_optimum_as_often_as_they_say(seeds: int, coverage: float) -> None:
    """Between the extremes of S seeds with a probability of 1 - 2 ** (1 - S), within three standard deviations of 400 draws."""
    rng, best = np.random.default_rng(1), 6e-3
    draws = [optima(runs_of(best, seeds, noise=0.2, rng=rng))[0] for _ in range(400)]
    inside = sum(found.low <= best <= found.high for found in draws) / len(draws)
    assert abs(inside - coverage) < 3 * (coverage * (1 - coverage) / len(draws)) ** 0.5
    assert all(found.low <= found.lr * (1 + 1e-9) and found.lr <= found.high * (1 + 1e-9) for found in draws)


def test_the_optimum_is_told_from_an_edge() -> None:
    (at_first,) = optima(runs_of(5e-4))
    assert (at_first.lr, at_first.at_edge) == (RATES[0], True)
    (at_last,) = optima(runs_of(1.0))
    assert (at_last.lr, at_last.at_edge) == (RATES[-1], True)


def test_a_rate_at_which_a_seed_diverged_is_not_the_best() -> None:
    found = [
        run if run.lr < 1e-2 or run.seed else SweepRun(value=64, lr=run.lr, seed=run.seed, eval_loss=math.nan)
        for run in runs_of(1e-2)
    ]
    (best,) = optima(found)
    assert best.lr == RATES[3] and best.at_edge
    assert sweep.mean_loss(found, 64, RATES[6]) == math.inf
    assert sweep.mean_loss(found, 64, 1.0) is None
    with pytest.raises(ValueError, match=r"at 64 a run diverged at every learning rate, the smallest 0.001"):
        optima([SweepRun(value=64, lr=run.lr, seed=run.seed, eval_loss=math.nan) for run in found])


def test_shift_is_between_the_farthest_optima() -> None:
    found = optima(
        [run for value, best in ((64, 4e-3), (128, 8e-3), (256, 2e-3)) for run in runs_of(best, value=value)]
    )
    assert [each.value for each in found] == [64, 128, 256]
    assert shift(found) == pytest.approx(4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parallel = {"processes": 1, "ep_size": 1, "zero_stage": 0, "device": "cpu"}
    train = {"steps": 12, "checkpoint_every": 2, "batch_size": 4}
    return write_recipe(tmp_path_factory.mktemp("sweep"), parallel=parallel, train=train)


def config(recipe: Path, *settings: str) -> RunConfig:
    return load_config(recipe, [MUP, *settings])


def finished(folder: Path, losses: dict[str, float | None]) -> None:
    """What `moe train` leaves, of what a sweep reads."""
    for name, loss in losses.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "summary.json").write_text(json.dumps({"eval_loss": loss}))


def names(options: SweepOptions) -> list[str]:
    return [
        f"{options.axis}-{value}-lr-{lr:g}-seed-{seed}"
        for value in options.values
        for lr in options.learning_rates
        for seed in options.seeds
    ]


def test_finished_runs_are_read(recipe: Path, tmp_path: Path) -> None:
    """No run is started: that would take seconds, and leave a run's files."""
    losses = {name: 2.0 + 0.01 * index for index, name in enumerate(names(OPTIONS))}
    finished(tmp_path, {**losses, names(OPTIONS)[0]: None})
    (tmp_path / names(OPTIONS)[1] / "summary.json").unlink()
    (tmp_path / names(OPTIONS)[1] / "diverged.txt").write_text("5 steps in a row had a non-finite loss")
    said: list[str] = []
    runs = run_sweep(config(recipe), OPTIONS, tmp_path, said.append)
    assert [run.eval_loss for run in runs[2:]] == list(losses.values())[2:]
    assert math.isnan(runs[0].eval_loss) and math.isnan(runs[1].eval_loss)
    assert said[0] == f"12 runs in {tmp_path}; those that have ended are read"
    assert said[2:4] == [
        "2 of 12: width 32, lr 0.001, seed 1: diverged",
        "3 of 12: width 32, lr 0.002, seed 0: loss 2.0200",
    ]
    assert not list(tmp_path.glob("*/config.yaml"))
    wide = load_config(tmp_path / "width-64.yaml")
    assert (wide.model.decoder["hidden_size"], wide.parametrization.base) == (64, config(recipe).parametrization.base)


def test_a_folder_of_another_sweep_is_refused(recipe: Path, tmp_path: Path) -> None:
    finished(tmp_path, dict.fromkeys(names(OPTIONS), 2.0))
    run_sweep(config(recipe), OPTIONS, tmp_path, lambda line: None)
    with pytest.raises(
        ValueError, match=r"holds another sweep: train.steps is 12 there and 13 here; choose another fol"
    ):
        run_sweep(config(recipe, "train.steps=13"), OPTIONS, tmp_path, lambda line: None)
    other = SweepOptions(axis="experts", values=(4,), learning_rates=OPTIONS.learning_rates, seeds=(0,))
    with pytest.raises(ValueError, match=r"holds another sweep: axis is 'width' there and 'experts' here"):
        run_sweep(config(recipe), other, tmp_path, lambda line: None)
    assert len(run_sweep(config(recipe, "name=other", "seed=3"), OPTIONS, tmp_path, lambda line: None)) == 12


def test_a_setting_that_has_come_since_is_no_other_sweep(recipe: Path, tmp_path: Path) -> None:
    finished(tmp_path, dict.fromkeys(names(OPTIONS), 2.0))
    run_sweep(config(recipe), OPTIONS, tmp_path, lambda line: None)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    del plan["recipe"]["optim"]["freeze_routers"]
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert len(run_sweep(config(recipe), OPTIONS, tmp_path, lambda line: None)) == 12


def test_a_running_sweep_is_not_disturbed(recipe: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"a sweep or one of its runs is running in .*; wait until it has ended"):
            run_sweep(config(recipe), OPTIONS, tmp_path, lambda line: None)


def test_what_cannot_be_swept(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.eval_fraction=0 holds nothing out"):
        run_sweep(config(recipe, "data.eval_fraction=0"), OPTIONS, tmp_path / "new", lambda line: None)
    odd = SweepOptions(axis="width", values=(32, 33), learning_rates=(1e-3, 2e-3, 3e-3), seeds=(0,))
    with pytest.raises(ValueError, match="no whole number at width 33"):
        run_sweep(config(recipe), odd, tmp_path / "new", lambda line: None)
    assert not (tmp_path / "new").exists(), "nothing was run before the last variant was known to exist"
    for rates in ((1e-3, 2e-3), (1e-3, 1e-3, 2e-3, 4e-3), (1e-3, -1e-3, 2e-3), (1e-3, math.inf, 2e-3)):
        with pytest.raises(ValueError, match="--lr needs at least three different positive learning rates"):
            SweepOptions(axis="width", values=(32,), learning_rates=rates, seeds=(0,))
    with pytest.raises(ValueError, match=r"--widths 32,32 needs different values"):
        SweepOptions(axis="width", values=(32, 32), learning_rates=(1e-3, 2e-3, 3e-3), seeds=(0,))


def arguments(recipe: Path, folder: Path, rates: str) -> list[str]:
    return ["mup", "sweep", str(recipe), str(folder), MUP, "--widths", "64", "--lr", rates, "--seeds", "1"]


@pytest.mark.slow  # real runs, each of which imports DeepSpeed
def test_real_runs_are_made_once_and_one_diverges(recipe: Path, tmp_path: Path) -> None:
    folder, picture = tmp_path / "runs", tmp_path / "new" / "sweep.png"
    command = arguments(recipe, folder, "2e-3,8e-3,1e30")
    first = run_moe(*command, "--json", "--picture", str(picture), folder=tmp_path)
    assert first.status == 0, first.stderr[-3000:]
    found = json.loads(first.stdout)
    assert [run["eval_loss"] is None for run in found["runs"]] == [False, False, True]
    assert found["optima"][0]["at_edge"] and found["optima"][0]["lr"] == 8e-3
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*")}
    again = run_moe(*command, "--json", folder=tmp_path)
    assert (again.status, again.stdout) == (0, first.stdout), again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*") if path.name != "sweep.json"} == {
        path: time for path, time in before.items() if path.name != "sweep.json"
    }
    (run,) = [run for run in found["runs"] if run["lr"] == 8e-3]
    summary = json.loads((folder / "width-64-lr-0.008-seed-0" / "summary.json").read_text())
    assert run["eval_loss"] == summary["eval_loss"] and summary["steps"] == 12


@pytest.mark.slow
def test_a_killed_sweep_goes_on(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    recipe = write_recipe(
        recipe.parent / "long",
        data={"source": str(recipe.parent / "text.txt")},
        parallel={"processes": 1, "ep_size": 1, "zero_stage": 0, "device": "cpu"},
        train={"steps": 20000, "checkpoint_every": 20, "batch_size": 4},
    )
    command = arguments(recipe, folder, "2e-3,4e-3,8e-3")
    run_dir = folder / "width-64-lr-0.002-seed-0"
    started = Command(["-m", "moe.cli", *command], tmp_path)
    started.wait_until(lambda: any(run_dir.glob("checkpoints/step-*")), "a checkpoint")
    (training,) = children(started.process.pid)
    os.kill(started.process.pid, signal.SIGKILL)  # the run outlives its sweep
    started.process.wait()
    refused = run_moe(*command, folder=tmp_path)
    assert refused.status == 2 and "a sweep or one of its runs is running" in refused.stderr, refused.stderr[-3000:]
    os.kill(training, signal.SIGKILL)

    going_on = Command(["-m", "moe.cli", *command], tmp_path)
    going_on.wait_until(lambda: any("resumed from step" in line for line in events(run_dir)), "the resumption")
    going_on.process.send_signal(signal.SIGTERM)  # ends the run well, then the sweep
    ended = going_on.end()
    assert ended.status not in (0, 2) and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert any("stopped by a signal" in line for line in events(run_dir))


def events(run_dir: Path) -> list[str]:
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [event["message"] for event in read_metrics(run_dir).events]
