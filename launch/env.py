"""What a process may know before torch and DeepSpeed are imported: devices, threads, free ports."""

import ctypes
import os
import signal
import socket
import sys
from typing import Literal

from moe.train.config import ParallelConfig


def num_gpus() -> int:
    """GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count()


def choose_processes(parallel: ParallelConfig) -> int:
    """How many processes `moe train` starts on this machine."""
    if parallel.processes != "auto":
        return parallel.processes
    gpus = 0 if parallel.device == "cpu" else num_gpus()
    return max(gpus // parallel.ep_size * parallel.ep_size, parallel.ep_size)


def choose_device(parallel: ParallelConfig, local_processes: int) -> Literal["cpu", "cuda"]:
    """Device type for all processes of this machine.

    Raises:
        ValueError: GPUs were asked for and there are fewer than processes.
    """
    if parallel.device == "cpu":
        return "cpu"
    gpus = num_gpus()
    if parallel.device == "cuda" and gpus < local_processes:
        raise ValueError(
            f"parallel.device=cuda needs one GPU for each of the {local_processes} processes and there are {gpus}; "
            "lower parallel.processes, or set parallel.device=cpu"
        )
    return "cuda" if gpus >= local_processes else "cpu"


def threads_per_process(local_processes: int) -> int:
    """CPU threads of each process so that they share the cores that this job may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // local_processes, 1)


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LAUNCHER_VARIABLE = "MOE_LAUNCHER_PID"
RESTARTS_VARIABLE = "MOE_RESTARTS"  # torchrun has its own: TORCHELASTIC_RESTART_COUNT


def was_restarted() -> bool:
    """Whether the launcher started this process again after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in (RESTARTS_VARIABLE, "TORCHELASTIC_RESTART_COUNT"))


def end_with_launcher() -> None:
    """Let the kernel end this process when the `moe train` that started it dies, even by SIGKILL (Linux)."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the line above
        sys.exit(1)
