"""A run that loses a process, stalls, or starts again with fewer processes goes on from its last checkpoint by itself."""

import os
import signal
from pathlib import Path

import pytest
from helpers.runs import (
    CHECKPOINT_EVERY,
    STEPS,
    Run,
    Training,
    assert_same_run,
    checkpoints,
    losses,
    reference_run,
    run_moe,
    write_recipe,
)
from typer.testing import CliRunner

from moe.cli import app
from moe.parallel.watchdog import STALLED_STATUS
from moe.train.config import load_config
from moe.train.metrics import read_metrics

STALL_SECONDS = 4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


def recipe_like(reference: Run, folder: Path) -> Path:
    config = load_config(reference.recipe)
    data = config.data.model_dump()
    return write_recipe(folder, moe=config.moe, data={key: data[key] for key in ("source", "cache_dir")})


def resumes(run_dir: Path) -> list[int]:
    """Steps from which the run went on."""
    messages = [event["message"] for event in read_metrics(run_dir).events]
    return [int(message.split()[3]) for message in messages if message.startswith("resumed from step")]


def test_a_killed_and_a_stalled_rank_cost_steps_but_nothing_else(reference: Run, tmp_path: Path) -> None:
    """One command: a rank is killed, then, after the restart, the other one is stopped; the end is the undisturbed one."""
    training = Training(
        recipe_like(reference, tmp_path), "parallel.max_restarts=2", f"parallel.stall_seconds={STALL_SECONDS}"
    )
    run_dir = training.run_dir
    training.wait_for_step(run_dir, 7)
    os.kill(training.workers()[0], signal.SIGKILL)
    training.wait_until(lambda: len(resumes(run_dir)) == 1, "the first restart")
    training.wait_for_step(run_dir, 22)
    stalled = training.workers()[1]
    os.kill(stalled, signal.SIGSTOP)
    ended = training.end()
    assert ended.status == 0, ended.stderr[-3000:]
    first, second = resumes(run_dir)
    assert 0 < first < second < STEPS and first % CHECKPOINT_EVERY == second % CHECKPOINT_EVERY == 0
    assert "ended with status 137: restart 1 of at most 2" in ended.stderr
    assert f"ended with status {STALLED_STATUS}: restart 2 of at most 2" in ended.stderr
    assert f"stall: rank 1 (host {os.uname().nodename}, pid {stalled}) has been silent" in ended.stderr
    stalls = [event for event in read_metrics(run_dir).events if event["message"].startswith("stall: rank 1")]
    assert len(stalls) == 1 and stalls[0]["step"] >= 22
    assert_same_run(run_dir, reference.dir)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_with_more_processes(reference: Run, tmp_path: Path) -> None:
    """As torchrun does it when a machine goes and comes back: the same batches, whoever computes them."""
    recipe = recipe_like(reference, tmp_path)
    quiet = "moe.router.jitter=0"  # each layout draws its own noise
    assert run_moe("train", str(recipe), "name=whole", quiet, folder=tmp_path).status == 0
    for processes, steps in ((2, 10), (1, 25), (2, STEPS)):
        training = Training(
            recipe, "--resume", quiet, f"parallel.processes={processes}", f"parallel.ep_size={processes}"
        )
        if steps < STEPS:
            training.wait_for_step(training.run_dir, steps)
            training.process.send_signal(signal.SIGTERM)
        assert training.end().status == 0
    found, expected = losses(training.run_dir), losses(tmp_path / "runs" / "whole")
    first = (
        min(resumes(training.run_dir)) + 4
    )  # sums in another order: later, close calls of the router begin to differ
    assert [found[i] for i in range(1, first)] == pytest.approx([expected[i] for i in range(1, first)], rel=1e-3)
    assert found == pytest.approx(expected, rel=0.05)
    assert len(resumes(training.run_dir)) == 2
    assert checkpoints(training.run_dir)[-1].name == f"step-{STEPS:08d}"


def test_a_batch_that_does_not_divide_is_explained(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = CliRunner().invoke(app, ["train", str(recipe), "parallel.processes=3", "parallel.ep_size=1"])
    assert ended.exit_code == 2
    assert "train.batch_size=8 is not divisible by train.micro_batch_size=4 times 3 processes" in ended.stderr


def test_a_stall_limit_beyond_the_collectives_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel\.stall_seconds=200 must be below parallel\.timeout_seconds=120"):
        load_config(write_recipe(tmp_path), ["parallel.stall_seconds=200"])
