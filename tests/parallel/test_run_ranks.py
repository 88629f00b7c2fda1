"""The helper itself: results by rank, the failing rank's traceback, and no waiting for ranks that hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RanksError, run_ranks
from torch import Tensor


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    assert torch.get_num_threads() == 1
    assert world_size == dist.get_world_size()
    return rank, total


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def die(rank: int, world_size: int) -> None:
    os._exit(7)


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1000)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(sum_of_ranks, 2, 10) == [(0, torch.tensor([21])), (1, torch.tensor([21]))]


def test_the_failing_rank_is_shown_first() -> None:
    with pytest.raises(RanksError, match=r"\Arank 1 of 2 failed\n(.*\n)*.*KeyError: 'the cause'"):
        run_ranks(fail_on_rank_1, 2)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RanksError, match=r"exit codes: \{0: 7\}"):
        run_ranks(die, 1)


def test_a_rank_that_hangs_is_killed_and_shown() -> None:
    started = time.monotonic()
    with pytest.raises(RanksError, match=r"(?s)still running after 10 s.*rank 1\n.*hang_on_rank_1"):
        run_ranks(hang_on_rank_1, 2, timeout=10)
    assert time.monotonic() - started < 25
