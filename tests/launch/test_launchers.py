"""The same training under other people's launchers, to the last bit as under `moe train`."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import (
    STEPS,
    Command,
    Run,
    all_ended,
    assert_same_run,
    checkpoints,
    reference_run,
    write_recipe,
)

from moe.launch.env import free_port
from moe.train.config import load_config
from moe.train.metrics import read_metrics


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


def arguments(reference: Run, folder: Path) -> list[str]:
    """What follows the launcher's own options."""
    config = load_config(reference.recipe)
    data = config.data.model_dump()
    recipe = write_recipe(folder, moe=config.moe, data={key: data[key] for key in ("source", "cache_dir")})
    return ["moe.launch.train", str(recipe), "name=run"]


def torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"]


def deepspeed_launcher() -> list[str]:
    options = ["--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    return ["-m", "deepspeed.launcher.runner", *options]


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def press_ctrl_c(pid: int) -> None:
    """To every process of the terminal's job; DeepSpeed's launcher on one machine passes nothing on, but sends SIGTERM."""
    os.killpg(pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "stop"), [(torchrun, terminate), (deepspeed_launcher, press_ctrl_c)])
def test_other_launchers(
    reference: Run, tmp_path: Path, launcher: Callable[[], list[str]], stop: Callable[[int], None]
) -> None:
    """A run that is stopped and then resumed under the launcher is the undisturbed one of `moe train`."""
    run = arguments(reference, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    command = Command([*launcher(), *run], tmp_path)
    command.wait_for_step(run_dir, 5)
    workers = list(command.workers().values())
    assert len(workers) == 2
    stop(command.process.pid)
    stopped = command.end()  # its status is the launcher's own affair
    assert all_ended(workers, timeout=60)
    assert "resumable" in stopped.stderr + stopped.stdout
    step = read_metrics(run_dir).train[-1]["step"]
    assert step < STEPS
    assert checkpoints(run_dir)[-1].name == f"step-{step:08d}"

    ended = Command([*launcher(), *run, "--resume"], tmp_path).end()
    assert ended.status == 0, ended.stderr[-3000:]
    assert f"resumed from step {step}" in ended.stderr + ended.stdout
    assert_same_run(run_dir, reference.dir)
