"""Collectives: uneven and empty blocks there and back, bf16, counts and sums."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor

from moe.parallel.collectives import all_reduce_sum, all_to_all, exchange_counts

W = 3
# SENT[r][s]: rows from rank r to rank s. Rank 1 sends nothing to rank 2, rank 2 only to itself, nobody else to rank 2.
UNEVEN = [[2, 1, 0], [3, 1, 0], [0, 0, 2]]
SENDS_NOTHING = [[0, 0, 0], [1, 2, 3], [0, 1, 0]]
RECEIVES_NOTHING = [[1, 0, 2], [2, 0, 1], [0, 0, 1]]
SILENCE = [[0] * W] * W
SPLITS = {
    "uneven": UNEVEN,
    "sends_nothing": SENDS_NOTHING,
    "receives_nothing": RECEIVES_NOTHING,
    "silence": SILENCE,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}


def rows_of(sent: list[list[int]], rank: int, dtype: torch.dtype) -> Tensor:
    """Row i for rank s from rank r is [r, s, i], exact in every dtype."""
    values = [[rank, s, i] for s in range(W) for i in range(sent[rank][s])]
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 3).to(dtype)


def exchange(rank: int, sent: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    rows = rows_of(sent, rank, dtype)
    rows.requires_grad_(dtype.is_floating_point)
    receive_W = [sent[s][rank] for s in range(W)]
    # a transposed layout: the collective must not assume contiguous rows
    received = all_to_all(rows.T.contiguous().T, sent[rank], receive_W, dist.group.WORLD)
    if not dtype.is_floating_point:
        return received, None
    # the gradient of each row says where it was received
    (received * (rank + 1)).sum().backward()
    return received.detach(), rows.grad


def all_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{split}-{dtype}": exchange(rank, sent, DTYPES[dtype]) for split, sent in SPLITS.items() for dtype in DTYPES
    }
    counts_WC = torch.tensor([[100 * rank + 10 * s, 7] for s in range(W)])
    found["counts"] = exchange_counts(counts_WC.T.contiguous().T, dist.group.WORLD)
    own = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    total = all_reduce_sum(own)
    found["sum"] = (total, own.detach(), total.requires_grad)
    found["sum_int"] = all_reduce_sum(torch.tensor([2**40 + rank]))
    pair = dist.new_group([0, 2])
    found["sum_pair"] = all_reduce_sum(torch.tensor([rank + 1]), pair) if rank != 1 else None
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, W, timeout=120)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_all_to_all(results: list[dict[str, Any]], split: str, dtype: str) -> None:
    sent = SPLITS[split]
    for rank in range(W):
        received, gradient = results[rank][f"{split}-{dtype}"]
        expected = [[r, rank, i] for r in range(W) for i in range(sent[r][rank])]
        assert received.dtype == DTYPES[dtype]
        assert received.shape == (len(expected), 3)
        assert received.tolist() == expected
        if dtype != "int64":
            assert gradient.dtype == DTYPES[dtype]
            assert gradient.tolist() == [[s + 1.0] * 3 for s in range(W) for _ in range(sent[rank][s])]


def test_exchange_counts(results: list[dict[str, Any]]) -> None:
    for rank in range(W):
        assert results[rank]["counts"].tolist() == [[100 * r + 10 * rank, 7] for r in range(W)]


def test_all_reduce_sum(results: list[dict[str, Any]]) -> None:
    for rank in range(W):
        total, own, has_gradient = results[rank]["sum"]
        assert total.tolist() == [6.0, 30.0]
        assert own.tolist() == [1.0 + rank, 10.0]  # the argument stays
        assert not has_gradient
        assert results[rank]["sum_int"].tolist() == [3 * 2**40 + 3]


def test_all_reduce_sum_of_a_group(results: list[dict[str, Any]]) -> None:
    assert [r["sum_pair"] and r["sum_pair"].tolist() for r in results] == [[4], None, [4]]
