"""`run_local`: statuses, signals and output of the processes it starts, with small modules in place of training."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.launch import local
from moe.launch.local import run_local

LIMIT = 60.0  # seconds; a worker here takes well below one


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module for workers, who have `rank`, `say(name)` to leave a file and `wait(seconds)`; gives its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    head = """
    import json, os, signal, sys, time
    from pathlib import Path
    rank = int(os.environ["RANK"])
    def say(name, text=""):
        partial = Path(os.environ["FOLDER"], f".{name}-{rank}")
        partial.write_text(text)
        partial.rename(Path(os.environ["FOLDER"], f"{name}-{rank}"))
    def wait(seconds=60.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        raise SystemExit("nobody stopped this worker")
    """

    def write(body: str) -> str:
        (tmp_path / "small_worker.py").write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return "small_worker"

    return write


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"never seen: {[path for path in paths if not path.exists()]}"
        time.sleep(0.01)


def test_every_worker_learns_its_place(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module('say("seen", json.dumps([dict(os.environ), sys.argv[1:], os.getsid(0) == os.getpid()]))')
    assert run_local(["a.yaml", "train.steps=3"], 3, module=name) == 0
    seen = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(3)]
    for rank, (environment, arguments, own_session) in enumerate(seen):
        assert arguments == ["a.yaml", "train.steps=3"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["MOE_LAUNCHER_PID"] == str(os.getpid())
        assert own_session, "Ctrl-C on the terminal must not reach it directly"
    assert len({environment["MASTER_PORT"] for environment, _, _ in seen}) == 1


def test_threads_are_shared_unless_the_user_says_otherwise(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module('say("threads", os.environ["OMP_NUM_THREADS"])')
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "threads_per_process", lambda processes: 10 // processes)
    assert run_local([], 2, module=name) == 0
    assert (tmp_path / "threads-1").read_text() == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_local([], 2, module=name) == 0
    assert (tmp_path / "threads-1").read_text() == "3"


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(7)", 7), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_a_failing_worker_stops_the_others_and_gives_the_status(
    module: Callable[[str], str], capfd: pytest.CaptureFixture[str], end: str, status: int
) -> None:
    name = module(f"wait() if rank != 1 else None\n{end}")
    begin = time.monotonic()
    assert run_local([], 3, module=name) == status
    assert time.monotonic() - begin < 30, "the others were waiting for a minute"
    assert "process of rank 1 ended with status" in capfd.readouterr().err


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    name = module("""
    if rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: say("asked"))
        say("ready")
        wait()
    while not Path(os.environ["FOLDER"], "ready-0").exists():
        time.sleep(0.01)
    sys.exit(5)
    """)
    begin = time.monotonic()
    assert run_local([], 2, module=name) == 5
    assert time.monotonic() - begin < 30
    assert (tmp_path / "asked-0").exists(), "it was asked first"


def test_a_worker_that_ends_well_stops_nobody(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("""
    if rank == 0:
        sys.exit(0)
    time.sleep(0.5)
    say("done")
    """)
    assert run_local([], 2, module=name) == 0
    assert (tmp_path / "done-1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_worker_once(module: Callable[[str], str], tmp_path: Path, number: signal.Signals) -> None:
    name = module(f"""
    seen = []
    signal.signal({int(number)}, lambda *_: seen.append(1))
    say("ready")
    end = time.monotonic() + 60
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(0 if len(seen) == 1 else 9)
    """)

    def send() -> None:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    before = signal.getsignal(number)
    sender.start()
    try:
        assert run_local([], 2, module=name) == 0
    finally:
        sender.join()
    assert signal.getsignal(number) == before


def test_workers_stdout_goes_to_stderr(module: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    name = module('print(f"from rank {rank}", flush=True)')
    assert run_local([], 2, module=name) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "from rank 0" in captured.err and "from rank 1" in captured.err


def test_nobody_is_left_when_the_launcher_itself_fails(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module('say("pid", str(os.getpid()))\nwait()')

    def failing(workers: object) -> int:
        wait_for(tmp_path / "pid-0", tmp_path / "pid-1")
        raise RuntimeError("a bug")

    monkeypatch.setattr(local, "_wait", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        run_local([], 2, module=name)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def test_the_interpreter_is_this_one(module: Callable[[str], str], tmp_path: Path) -> None:
    assert run_local([], 1, module=module('say("python", sys.executable)')) == 0
    assert (tmp_path / "python-0").read_text() == sys.executable


def test_a_lost_worker_is_started_again_and_told(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("""
    restarts = os.environ["MOE_RESTARTS"]
    say(f"start-{restarts}")
    if restarts < "2" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert run_local([], 2, module=name, max_restarts=3) == 0
    assert sorted(path.name for path in tmp_path.glob("start-*-1")) == [f"start-{i}-1" for i in range(3)]


def test_restarts_are_counted(module: Callable[[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = module('say("start-" + os.environ["MOE_RESTARTS"])\nos.kill(os.getpid(), signal.SIGKILL)')
    assert run_local([], 1, module=name, max_restarts=2) == 137
    assert len(list(tmp_path.glob("start-*"))) == 3
    assert "restart 2 of at most 2" in capfd.readouterr().err


@pytest.mark.parametrize("status", [0, 2, 3])
def test_what_would_fail_the_same_way_again_is_not_restarted(
    module: Callable[[str], str], tmp_path: Path, status: int
) -> None:
    name = module(f'say("start-" + os.environ["MOE_RESTARTS"])\nsys.exit({status})')
    assert run_local([], 1, module=name, max_restarts=5) == status
    assert len(list(tmp_path.glob("start-*"))) == 1


def test_a_run_that_was_asked_to_stop_is_not_restarted(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module('say("start-" + os.environ["MOE_RESTARTS"])\nwait()')

    def send() -> None:
        wait_for(tmp_path / "start-0-0")
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert run_local([], 1, module=name, max_restarts=5) == 128 + signal.SIGTERM
    finally:
        sender.join()
    assert len(list(tmp_path.glob("start-*"))) == 1


def test_after_a_stall_nobody_is_given_time_for_a_checkpoint(module: Callable[[str], str]) -> None:
    """The rank that stalls is stopped for good: SIGTERM would never reach it."""
    name = module(f"""
    if rank == 0:
        say("stopping", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    while not Path(os.environ["FOLDER"], "stopping-0").exists():
        time.sleep(0.01)
    sys.exit({local.STALLED_STATUS})
    """)
    begin = time.monotonic()
    assert run_local([], 2, module=name) == local.STALLED_STATUS
    assert time.monotonic() - begin < local.STALLED_GRACE_SECONDS + 20
