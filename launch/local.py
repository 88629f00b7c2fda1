"""Starts the processes of a run on this machine, passes signals on, and stops all when one fails."""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from moe.launch.env import LAUNCHER_VARIABLE, free_port, threads_per_process

GRACE_SECONDS = 60.0  # to write a checkpoint after SIGTERM


def run_local(arguments: list[str], processes: int, module: str = "moe.launch.train") -> int:
    """Run ``python -m MODULE ARGUMENTS`` in ``processes`` processes; returns the first failing exit status, or 0.

    SIGTERM and SIGINT reach every process once; a process that fails takes the others with it, after `GRACE_SECONDS`.
    The processes' stdout goes to stderr: stdout belongs to the command that called this.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads_per_process(processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    command = [sys.executable, "-m", module, *arguments]
    workers: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
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
        return _wait(workers)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    failed_at, status = None, 0
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            code = worker.poll()
            if code and failed_at is None:
                failed_at, status = time.monotonic(), code if code > 0 else 128 - code
                print(f"process of rank {rank} ended with status {code}: stopping the others", file=sys.stderr)
                for other in workers:
                    if other.poll() is None:
                        other.terminate()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.05)
    codes = [worker.returncode for worker in workers]
    return status or next((code if code > 0 else 128 - code for code in codes if code), 0)
