"""Starts the processes of a run on this machine, passes signals on, stops all when one fails, and starts again if asked to."""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from moe.launch.env import LAUNCHER_VARIABLE, RESTARTS_VARIABLE, free_port, threads_per_process
from moe.parallel.watchdog import STALLED_STATUS

GRACE_SECONDS = 60.0  # to write a checkpoint after SIGTERM
STALLED_GRACE_SECONDS = 2.0  # a run that stalls cannot write one
# A mistake of the user's and a training that cannot go on fail the same way again: see `moe.launch.train`.
HOPELESS_STATUSES = (2, 3)


def run_local(arguments: list[str], processes: int, module: str = "moe.launch.train", max_restarts: int = 0) -> int:
    """Run ``python -m MODULE ARGUMENTS`` in ``processes`` processes; returns the first failing exit status, or 0.

    SIGTERM and SIGINT reach every process once; a process that fails takes the others with it, after `GRACE_SECONDS`.
    The processes' stdout goes to stderr: stdout belongs to the command that called this. Unless a signal asked to stop or
    the failure would only repeat, all are started again, at most ``max_restarts`` times; they find in `RESTARTS_VARIABLE`
    how often that has happened.
    """
    for restarts in range(max_restarts + 1):
        asked_to_stop, status = _run_once(arguments, processes, module, restarts)
        if status == 0 or status in HOPELESS_STATUSES or asked_to_stop or restarts == max_restarts:
            break
        print(f"ended with status {status}: restart {restarts + 1} of at most {max_restarts}", file=sys.stderr)
    return status


def _run_once(arguments: list[str], processes: int, module: str, restarts: int) -> tuple[bool, int]:
    """Whether a signal asked to stop, and the status."""
    environment = {
        "OMP_NUM_THREADS": str(threads_per_process(processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHER_VARIABLE: str(os.getpid()),
        RESTARTS_VARIABLE: str(restarts),
    }
    command = [sys.executable, "-m", module, *arguments]
    workers: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(processes):
            worker = subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=sys.stderr.fileno(),
                start_new_session=True,  # so that Ctrl-C comes once, from here
            )
            workers.append(worker)
        status = _wait(workers)
        return bool(asked), status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    failed_at, status, grace = None, 0, GRACE_SECONDS
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            code = worker.poll()
            if code and failed_at is None:
                failed_at, status = time.monotonic(), code if code > 0 else 128 - code
                grace = STALLED_GRACE_SECONDS if code == STALLED_STATUS else GRACE_SECONDS
                print(f"process of rank {rank} ended with status {code}: stopping the others", file=sys.stderr)
                for other in workers:
                    if other.poll() is None:
                        other.terminate()
        if failed_at is not None and time.monotonic() - failed_at > grace:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.05)
    codes = [worker.returncode for worker in workers]
    return status or next((code if code > 0 else 128 - code for code in codes if code), 0)
