"""Run a function in several processes that form a gloo group, and bring back each one's result or the failing traceback.

Importing DeepSpeed and transformers takes seconds of CPU time. So one process, without threads and without a GPU, imports
them once for all tests, and every rank is a fork of it.
"""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

_PRELOADED = ["pytest", "moe.models", "moe.parallel.engine", "moe.launch.train", "moe.train.trainer"]
_FIXED = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_GRACE_SECONDS = 2.0  # for the other ranks to notice that one has died, and to say what they saw


class RanksError(RuntimeError):
    """A rank raised, died, or did not end in time; the message has its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """``fn(rank, world_size, *args)`` in ``world_size`` processes; their results by rank.

    The processes have the environment of this one as it is now, and a state of torch in which nothing has run.

    Args:
        fn: a function of an importable module; it, its arguments and its result must pickle.
        world_size: number of processes. They meet in a file, so no port is needed.
        args: the same for all ranks.
        timeout: seconds after which everything is killed; the error then shows where each rank was.

    Raises:
        RanksError: a rank failed. The first one to fail is shown first, all others are killed.
    """
    context = _forks()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        root, call, environment = Path(folder), pickle.dumps((fn, args)), dict(os.environ) | _FIXED
        processes: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(root, call, environment, rank, world_size, timeout), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(root, processes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((root / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, _FIXED):  # it keeps what it is started with
        multiprocessing.forkserver.ensure_running()
    return context


def _wait(root: Path, processes: list[BaseProcess], deadline: float, timeout: float) -> None:
    while any(process.exitcode != 0 for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            _join_all(processes, _GRACE_SECONDS)
            raise RanksError(_describe_failure(root, processes))
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for rank in alive:
                os.kill(processes[rank].pid or 0, signal.SIGUSR1)
            time.sleep(0.5)
            stacks = "\n".join(f"--- rank {rank}\n{_read(root / f'stack-{rank}')}" for rank in alive)
            raise RanksError(f"ranks {alive} of {len(processes)} were still running after {timeout} s\n{stacks}")
        time.sleep(0.02)


def _join_all(processes: list[BaseProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))


def _describe_failure(root: Path, processes: list[BaseProcess]) -> str:
    errors = sorted(root.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    parts = [f"rank {path.name.partition('-')[2]} of {len(processes)} failed\n{_read(path)}" for path in errors]
    silent = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode not in (None, 0, 1)}
    if silent:
        parts.append(f"ranks that died without a traceback, with their exit codes: {silent}")
    return "\n".join(parts) or f"exit codes {[process.exitcode for process in processes]} without a traceback"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else "(nothing)"


def _rank_main(
    root: Path, call: bytes, environment: dict[str, str], rank: int, world_size: int, timeout: float
) -> None:
    faulthandler.register(signal.SIGUSR1, file=(root / f"stack-{rank}").open("w"), all_threads=False)
    os.environ.clear()
    os.environ |= environment
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch, once per call site and process
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        result = _in_group(root, call, rank, world_size, timeout)
        # Renamed when complete: a file of that name is a result.
        (root / f"part-{rank}").write_bytes(pickle.dumps(result))
        (root / f"part-{rank}").rename(root / f"result-{rank}")
    except BaseException:
        (root / f"part-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        (root / f"part-{rank}").rename(root / f"error-{rank}")
        sys.stdout.flush()
        os._exit(1)  # no clean-up: it could wait for the other ranks


def _in_group(root: Path, call: bytes, rank: int, world_size: int, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    from moe.parallel.ranks import init_ranks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    fn, args = pickle.loads(call)  # imports the module of fn, and what it needs
    init_ranks("cpu", timeout)  # takes the group that exists
    torch.manual_seed(0)
    result = fn(rank, world_size, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result
