"""What the parts share: seeds, means and spreads, and runs in parallel processes."""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from benchmarks.spec import Options

SEEDS = (0, 1, 2)
TUNING_SEED = 100  # learning rates are chosen on it and reported on none of `SEEDS`

Job = TypeVar("Job")
Result = TypeVar("Result")


def mean(values: Sequence[float], digits: int = 4) -> float:
    return round(statistics.mean(values), digits)


def spread(values: Sequence[float], digits: int = 4) -> float | None:
    """Sample standard deviation over seeds."""
    return round(statistics.stdev(values), digits) if len(values) > 1 else None


def listed(values: Sequence[float], digits: int = 4) -> str:
    """The single values, for the CSV and the pictures."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def one_thread() -> None:
    """Of a worker process: as many of them as processors run at once."""
    torch.set_num_threads(1)


def run_all(
    worker: Callable[[Job], Result], jobs: Sequence[Job], options: Options, describe: Callable[[Result], str]
) -> list[Result]:
    """``worker(job)`` for each job, in order; in processes of one thread each, or here and now for a quick run."""
    results: list[Result] = []
    if options.quick:
        for job in jobs:
            results.append(worker(job))
            options.report(describe(results[-1]))
        return results
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(jobs))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread) as pool:
        for result in pool.map(worker, jobs):
            results.append(result)
            options.report(describe(result))
    return results
