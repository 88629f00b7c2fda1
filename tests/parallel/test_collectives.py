"""Collectives: uneven and empty blocks, several under way at once, counts and sums."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor

from moe.parallel import trace
from moe.parallel.collectives import Label, Peers, all_reduce_sum, start_all_to_all, start_counts

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


def all_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    peers = Peers(group=dist.group.WORLD, ranks=tuple(range(W)), rank=rank)
    pending = {
        # a transposed layout: the collective must not assume contiguous rows
        f"{split}-{dtype}": start_all_to_all(
            rows_of(sent, rank, DTYPES[dtype]).T.contiguous().T,
            sent[rank],
            [sent[s][rank] for s in range(W)],
            peers,
            Label(name=f"{split} {dtype}", layer="somewhere"),
        )
        for split, sent in SPLITS.items()
        for dtype in DTYPES
    }
    counts_WC = torch.tensor([[100 * rank + 10 * s, 7] for s in range(W)])
    counts = start_counts(counts_WC.T.contiguous().T, peers, Label(name="counts"))
    found: dict[str, Any] = {"in_flight": [(one.layer, one.name, one.send) for one in trace.in_flight()]}
    found |= {name: rows.wait() for name, rows in reversed(pending.items())}
    found["counts"] = counts.wait()
    found["in_flight_after"] = trace.in_flight()
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
    """Started all at once, and waited for in the opposite order."""
    sent = SPLITS[split]
    for rank in range(W):
        received = results[rank][f"{split}-{dtype}"]
        expected = [[r, rank, i] for r in range(W) for i in range(sent[r][rank])]
        assert received.dtype == DTYPES[dtype]
        assert received.shape == (len(expected), 3)
        assert received.tolist() == expected


def test_counts(results: list[dict[str, Any]]) -> None:
    for rank in range(W):
        counts = results[rank]["counts"]
        assert counts.sent == [[100 * rank + 10 * s, 7] for s in range(W)]
        assert counts.received == [[100 * r + 10 * rank, 7] for r in range(W)]


def test_what_is_under_way_is_on_record(results: list[dict[str, Any]]) -> None:
    for rank in range(W):
        expected = [("somewhere", f"{s} {dtype}", tuple(SPLITS[s][rank])) for s in SPLITS for dtype in DTYPES]
        assert results[rank]["in_flight"] == [*expected, ("", "counts", (1,) * W)]
        assert results[rank]["in_flight_after"] == ()


def test_all_reduce_sum(results: list[dict[str, Any]]) -> None:
    for rank in range(W):
        total, own, has_gradient = results[rank]["sum"]
        assert total.tolist() == [6.0, 30.0]
        assert own.tolist() == [1.0 + rank, 10.0]  # the argument stays
        assert not has_gradient
        assert results[rank]["sum_int"].tolist() == [3 * 2**40 + 3]


def test_all_reduce_sum_of_a_group(results: list[dict[str, Any]]) -> None:
    assert [r["sum_pair"] and r["sum_pair"].tolist() for r in results] == [[4], None, [4]]
