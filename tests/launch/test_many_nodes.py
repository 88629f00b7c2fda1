"""Training on two machines, which are network namespaces here: by torchrun, ssh and DeepSpeed, over bad links, and with one lost.

What is trained is compared with `moe train` on one machine, to the last bit where the layout is the same.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import namespaces
from helpers.namespaces import Node, Process, cut, find_sshd, ssh_servers, two_nodes
from helpers.runs import (
    STEPS,
    TIMEOUT,
    Run,
    assert_same_run,
    checkpoints,
    clean_environment,
    losses,
    reference_run,
    write_recipe,
)

from moe.parallel.watchdog import STALLED_STATUS
from moe.train.config import load_config
from moe.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Processes to end after the test, whatever becomes of it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


def recipe_like(reference: Run, folder: Path, **parallel: object) -> Path:
    """The reference's recipe on the same data, for one process on each machine."""
    config = load_config(reference.recipe)
    data = config.data.model_dump()
    return write_recipe(
        folder,
        moe=config.moe,
        data={key: data[key] for key in ("source", "cache_dir")},
        parallel={"processes": "auto", **parallel},
    )


def write_hostfile(nodes: list[Node], folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    return path


def launch(nodes: list[Node], recipe: Path, *options: str) -> list[str]:
    hostfile = write_hostfile(nodes, recipe.parent)
    return [sys.executable, "-m", "moe.cli", "launch", str(recipe), "--hostfile", str(hostfile), *options]


def by_torchrun(
    nodes: list[Node], recipe: Path, started: list[Process], *options: str, attempt: str = "out"
) -> list[Process]:
    """`moe launch --launcher torchrun` on each machine."""
    for node in nodes:
        command = launch(nodes, recipe, "--launcher", "torchrun", "--this-host", node.address, *options)
        started.append(node.start(command, recipe.parent / attempt))
    return started[-len(nodes) :]


def wait_until(happened: Callable[[], bool], processes: list[Process], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        for process in processes:
            assert process.process.poll() is None, f"ended before {what}:\n{process.output[-3000:]}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.02)


def wait_for_step(run_dir: Path, step: int, processes: list[Process]) -> None:
    def happened() -> bool:
        return (run_dir / "metrics.jsonl").exists() and any(r["step"] >= step for r in read_metrics(run_dir).train)

    wait_until(happened, processes, f"step {step}")


def assert_all_ended_well(processes: list[Process]) -> None:
    for process in processes:
        assert process.end() == 0, process.output[-3000:]


def test_torchrun(reference: Run, tmp_path: Path, started: list[Process]) -> None:
    recipe = recipe_like(reference, tmp_path)
    with two_nodes() as (nodes, kind):
        assert kind == "veth"
        assert_all_ended_well(by_torchrun(nodes, recipe, started))
    assert_same_run(tmp_path / "runs" / "run", reference.dir)


def test_a_bad_link_slows_but_does_not_corrupt(reference: Run, tmp_path: Path, started: list[Process]) -> None:
    recipe = recipe_like(reference, tmp_path)
    with two_nodes(delay_ms=4.0, loss=0.01, seed=7) as (nodes, kind):
        print(f"the link is made by {kind}")
        assert_all_ended_well(by_torchrun(nodes, recipe, started, "parallel.stall_seconds=60"))
    run_dir = tmp_path / "runs" / "run"
    assert_same_run(run_dir, reference.dir)
    seconds = sorted(record["step_seconds"] for record in read_metrics(run_dir).train)
    # Two layers with four exchanges each way and then the sums: more than ten one-way trips, whatever the machine.
    assert seconds[len(seconds) // 2] > 10 * 0.004


def test_a_cut_link_is_a_stall_that_both_sides_report(reference: Run, tmp_path: Path, started: list[Process]) -> None:
    recipe = recipe_like(reference, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    with two_nodes() as (nodes, _):
        processes = by_torchrun(nodes, recipe, started, "parallel.stall_seconds=5")
        wait_for_step(run_dir, 6, processes)
        cut(nodes[1])
        begin = time.monotonic()
        wait_until(lambda: "silent" in processes[0].output, [], "the accusation on node0")
        wait_until(lambda: "silent" in processes[1].output, [], "the accusation on node1")
        assert time.monotonic() - begin < 5 * 1.5 + 5
        wait_until(lambda: f"exitcode  : {STALLED_STATUS}" in processes[0].output, [], "the status, as torchrun saw it")
    assert "stall: rank 1 (host node1, " in processes[0].output
    assert "stall: rank 0 (host node0, " in processes[1].output
    assert any("stall: rank 1 (host node1" in event["message"] for event in read_metrics(run_dir).events)


def test_a_lost_machine_shrinks_the_run(reference: Run, tmp_path: Path, started: list[Process]) -> None:
    """The second machine loses its power; the first goes on alone from the last checkpoint, with the same batches."""
    recipe = recipe_like(reference, tmp_path, ep_size=1, zero_stage=1)
    run_dir = tmp_path / "runs" / "run"
    options = ["--min-nodes", "1", "parallel.max_restarts=2", "moe.router.jitter=0"]
    with two_nodes() as (nodes, _):
        assert_all_ended_well(by_torchrun(nodes, recipe, started, *options, "name=whole", attempt="whole"))
        processes = by_torchrun(nodes, recipe, started, *options)
        wait_for_step(run_dir, 12, processes)
        survivor, lost = processes
        lost.kill()
        assert survivor.end() == 0, survivor.output[-3000:]
    resumed = [
        event["message"] for event in read_metrics(run_dir).events if event["message"].startswith("resumed from")
    ]
    assert len(resumed) == 1, "once, and it did not start over"
    step = int(resumed[0].split()[3])
    found, expected = losses(run_dir), losses(tmp_path / "runs" / "whole")
    assert len(found) == STEPS
    # Sums in another order: the same at first, then routing decisions that were close calls begin to differ.
    assert [found[i] for i in range(1, step + 4)] == pytest.approx([expected[i] for i in range(1, step + 4)], rel=1e-3)
    assert found == pytest.approx(expected, rel=0.05)


# --- over ssh


@pytest.fixture(scope="module")
def sshd() -> str:
    path = find_sshd()
    if path is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip(f"ssh and sshd are needed; {namespaces.SSHD_VARIABLE} may name an sshd outside of PATH")
    return path


def environment_options() -> list[str]:
    variables = clean_environment()
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED")
    options = [f"{name}={variables[name]}" for name in names] + [f"GLOO_SOCKET_IFNAME={namespaces.DEVICE}"]
    return [part for option in options for part in ("--env", option)]


def test_ssh_starts_stops_and_resumes_all_machines(
    reference: Run, tmp_path: Path, started: list[Process], sshd: str
) -> None:
    recipe = recipe_like(reference, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    with two_nodes() as (nodes, _), ssh_servers(nodes, sshd, tmp_path / "ssh") as config:
        options = ["--launcher", "ssh", "--ssh-config", str(config), *environment_options()]
        first = nodes[0].start(launch(nodes, recipe, *options), tmp_path / "first")
        started.append(first)
        wait_for_step(run_dir, 5, [first])
        os.kill(first.process.pid, signal.SIGTERM)
        first.end()
        step = read_metrics(run_dir).train[-1]["step"]
        assert step < STEPS and checkpoints(run_dir)[-1].name == f"step-{step:08d}"
        assert "resumable" in first.output

        second = nodes[0].start(launch(nodes, recipe, "--resume", *options), tmp_path / "second")
        started.append(second)
        assert second.end() == 0, second.output[-3000:]
        assert f"resumed from step {step}" in second.output
    assert_same_run(run_dir, reference.dir)


def test_deepspeed_with_a_hostfile(
    reference: Run, tmp_path: Path, started: list[Process], sshd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("DeepSpeed's launcher reaches other machines by pdsh, which is not on PATH")
    recipe = recipe_like(reference, tmp_path)
    variables = {**clean_environment(), "GLOO_SOCKET_IFNAME": namespaces.DEVICE, "DS_ACCELERATOR": "cpu"}
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={variables[name]}\n" for name in names))
    monkeypatch.chdir(tmp_path)
    with two_nodes() as (nodes, _), ssh_servers(nodes, sshd, tmp_path / "ssh") as config:
        options = ["--launcher", "deepspeed", "--ssh-config", str(config)]
        process = nodes[0].start(launch(nodes, recipe, *options), tmp_path / "out", DS_ACCELERATOR="cpu")
        started.append(process)
        assert process.end() == 0, process.output[-3000:]
    assert_same_run(tmp_path / "runs" / "run", reference.dir)
