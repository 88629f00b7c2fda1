"""The watchdog names who keeps the others waiting: sleeping, stopped, busy without Python, or in another collective.

The ranks are real processes in a gloo group; they train nothing, but go through the phases of a step and its collectives.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RanksError, run_ranks

from moe.parallel import trace
from moe.parallel.heartbeat import Sign
from moe.parallel.ranks import Ranks
from moe.parallel.stacks import BusyMeter, training_threads
from moe.parallel.watchdog import STALLED_STATUS, Watchdog, judge

LIMIT = 2.0
STALL_STEP = 3


def _sleep() -> None:
    time.sleep(1000)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, it keeps Python's lock: no other thread of this process runs


FAULTS: dict[str, Callable[[], None]] = {"sleep": _sleep, "stop": _stop, "hold": _hold_the_interpreter}


def _exchange(layer: str) -> None:
    """As an expert exchange does it: every rank sends one row to each."""
    world_size = dist.get_world_size()
    rows = torch.ones(world_size, 4)
    ones = [1] * world_size
    with trace.collective("dispatch rows", layer, ones, ones):
        dist.all_to_all_single(torch.empty_like(rows), rows)


def _steps(rank: int, world_size: int, folder: str, culprit: int, fault: str, phase: str, quick: bool = False) -> float:
    """Steps of a training; returns when the stall began, unless the process is ended before."""
    ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))

    def report(message: str) -> None:
        # Written whole and then renamed: the reader looks for the name.
        partial = Path(folder, f".said-{rank}")
        partial.write_text(f"{time.time()}\n{message}")
        partial.rename(Path(folder, f"said-{rank}"))

    watchdog = Watchdog(ranks, LIMIT, 120.0, report)
    watchdog.start(0)
    for step in range(STALL_STEP + 2):
        for current in ("loading the batch", "forward", "optimizer step"):
            watchdog.at(step, current)
            if step == STALL_STEP and current == phase and rank == culprit:
                if not quick:
                    time.sleep(0.5)  # a sign from here gets out
                Path(folder, "began").write_text(str(time.time()))
                if fault == "skip":
                    dist.barrier()
                    continue
                FAULTS[fault]()
            if current == "forward":
                _exchange("layers.0.mlp")
                _exchange("layers.1.mlp")
            elif current == "optimizer step":
                ranks.sum([1.0])
    watchdog.stop()
    return 0.0


def stall(
    tmp_path: Path, culprit: int, fault: str, phase: str, world_size: int = 3, quick: bool = False
) -> tuple[list[str], str, float]:
    """Let it happen: who spoke, the message, and how many seconds after the beginning."""
    with pytest.raises(RanksError) as failure:
        run_ranks(_steps, world_size, str(tmp_path), culprit, fault, phase, quick, timeout=60)
    assert str(STALLED_STATUS) in str(failure.value), str(failure.value)
    said = sorted(path.name for path in tmp_path.glob("said-*"))
    assert said, f"nobody was named: {failure.value}"
    when, _, message = (tmp_path / said[0]).read_text().partition("\n")
    return said, message, float(when) - float((tmp_path / "began").read_text())


@pytest.mark.parametrize(
    ("culprit", "fault", "phase"),
    [
        (1, "sleep", "forward"),
        (0, "sleep", "loading the batch"),
        (2, "sleep", "optimizer step"),
        (1, "stop", "forward"),
        (0, "stop", "forward"),
        (2, "hold", "forward"),
    ],
)
def test_the_late_rank_is_named_with_what_the_others_wait_for(
    tmp_path: Path, culprit: int, fault: str, phase: str
) -> None:
    said, message, seconds = stall(tmp_path, culprit, fault, phase)
    first, *others = message.splitlines()
    assert f"stall: rank {culprit} (host " in first
    assert f"step {STALL_STEP + 1}, {phase}" in first
    assert "its latest exchange was layers.1.mlp: dispatch rows, send [1, 1, 1], receive [1, 1, 1]" in first
    assert len([line for line in message.splitlines() if line.startswith("stall:")]) == 1
    waiting = [line for line in others if " waits in " in line]
    expected = (
        "waits in all_reduce" if phase == "optimizer step" else "waits in layers.0.mlp: dispatch rows, send [1, 1, 1]"
    )
    assert waiting and all(expected in line for line in waiting), message
    assert not any(f"rank {culprit} " in line for line in waiting)
    assert LIMIT / 2 < seconds < LIMIT + 2, f"named after {seconds:.1f} s"  # 2 s for a busy machine
    if fault == "sleep":
        assert "in no collective" in first and "time.sleep(1000)" in message, "the stack says where"
    else:
        assert "silent" in first
    if culprit == 0 and fault == "stop":
        assert len(said) <= 2, "without the store the ranks cannot agree on who speaks"
    else:
        assert said == ["said-1" if culprit == 0 else "said-0"], "one rank speaks"


def test_rank_0_that_stops_before_its_first_sign(tmp_path: Path) -> None:
    """The store stops with it, so the others never read what it does."""
    _, message, seconds = stall(tmp_path, 0, "stop", "loading the batch", world_size=2, quick=True)
    assert "stall: rank 0 (host " in message and "has been silent" in message
    assert LIMIT / 2 < seconds < LIMIT + 2, f"named after {seconds:.1f} s"


def test_a_skipped_collective_is_told_from_a_late_rank(tmp_path: Path) -> None:
    said, message, _ = stall(tmp_path, 1, "skip", "forward", world_size=2)
    assert said == ["said-0"]
    assert "the ranks wait in different collectives" in message
    assert "rank 0 " in message and "waits in layers.0.mlp: dispatch rows" in message
    assert "waits in barrier" in message


def _patience(rank: int, world_size: int) -> str:
    """What takes long on rank 0 but is no stall: its first step, an evaluation, a checkpoint, steps that go on."""
    ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))
    said: list[str] = []
    watchdog = Watchdog(ranks, 0.8, 60.0, said.append)
    watchdog.start(5)
    plan = [(5, "forward", 2.0), (6, "evaluation", 2.0), (6, "checkpoint", 2.0)] + [
        (7 + i, "forward", 0.5) for i in range(6)
    ]
    for step, phase, seconds in plan:
        watchdog.at(step, phase)
        if rank == 0:
            time.sleep(seconds)
        ranks.barrier()
    watchdog.stop()
    return "".join(said)


def test_slow_is_not_stalled() -> None:
    assert run_ranks(_patience, 2) == ["", ""]


def _busy_times(rank: int, world_size: int) -> tuple[float, float]:
    """Seconds that each rank was busy while rank 0 worked for one and a half and rank 1 for half a second."""
    meter = BusyMeter()
    dist.barrier()
    meter.start()
    own = 1.5 if rank == 0 else 0.5
    time.sleep(own)
    dist.barrier()
    busy = meter.take()
    time.sleep(0.5)
    again = meter.take()
    meter.stop()
    return busy, again


def test_busy_time_is_what_a_rank_does_not_wait() -> None:
    (slow, slow_again), (fast, fast_again) = run_ranks(_busy_times, 2)
    assert 1.2 < slow < 2.2 and 0.3 < fast < 1.1 and slow > 1.5 * fast
    assert slow_again > 0.3 and fast_again > 0.3, "each reading begins anew"


def test_threads_beside_the_training_are_not_looked_at() -> None:
    done = threading.Event()
    beside = threading.Thread(target=done.wait, daemon=True)
    beside.start()
    try:
        assert beside.ident not in training_threads()
        assert threading.main_thread().ident in training_threads()
    finally:
        done.set()


# --- the judgement itself


def sign(rank: int, **values: object) -> Sign:
    plain = Sign(
        rank=rank, host=f"node{rank}", pid=100 + rank, beat=1, step=6, phase="forward", limit=10.0, quiet=12.0, issued=3,
        latest="", waiting="all_reduce", stack="",
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


def verdict_of(*signs: tuple[Sign, float], observer: int = 0) -> tuple[int, ...] | None:
    verdict = judge({sign.rank: (sign, still) for sign, still in signs}, observer, silence=3.0)
    return None if verdict is None else verdict.accused


def test_nobody_is_late_before_the_limit_of_its_phase() -> None:
    late = sign(1, waiting=None)
    assert verdict_of((sign(0), 0.0), (late, 0.0)) == (1,)
    assert verdict_of((sign(0, quiet=9.0), 0.0), (late, 0.0)) is None, "the observer has not waited for long"
    assert verdict_of((sign(0), 0.0), (replace(late, quiet=9.0), 0.0)) is None, "it was late, but goes on"
    assert verdict_of((sign(0), 0.0), (replace(late, limit=100.0), 0.0)) is None, "its phase may take longer"


def test_silence_counts_as_late_and_the_smallest_waiting_rank_speaks() -> None:
    silent = (sign(0), 3.5)
    assert verdict_of(silent, (sign(1), 0.0), (sign(2), 0.0), observer=2) == (0,)
    found = judge({0: silent, 1: (sign(1), 0.0), 2: (sign(2), 0.0)}, 2, silence=3.0)
    assert found is not None and found.speaker == 1
    assert verdict_of((replace(silent[0], limit=100.0), 3.5), (sign(1), 0.0), observer=1) == (0,), "it may be further"
    assert verdict_of(silent, (sign(1, limit=100.0), 0.0), observer=1) is None


def test_several_late_ranks_are_all_named() -> None:
    assert verdict_of((sign(0), 0.0), (sign(1, waiting=None), 0.0), (sign(2), 5.0), (sign(3), 0.0)) == (1, 2)


def test_all_in_the_same_collective_points_at_the_network() -> None:
    found = judge({rank: (sign(rank), 0.0) for rank in range(12)}, 0, silence=3.0)
    assert found is not None and found.accused == () and found.speaker == 0
    assert "look at the network" in found.message and "and 4 more ranks wait" in found.message
