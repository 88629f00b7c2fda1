"""Collectives between the ranks of a group, started without waiting, and the small reductions that training needs.

Each start is recorded in `moe.parallel.trace` until it was waited for. Ranks must issue them in the same order; with how
many rows, down to none, does not matter.

Legend: R rows, W ranks of the group, M numbers per rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.parallel import trace

Group = dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The ranks that take part in a collective.

    Attributes:
        group: the process group; ``None`` is the default one.
        ranks: their numbers in the expert-parallel group, in group order.
        rank: this process's number among them.
    """

    group: Group
    ranks: tuple[int, ...]
    rank: int

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a collective is called in `moe.parallel.trace`."""

    name: str
    layer: str = ""


def _announce(
    label: Label, send_W: Sequence[int], receive_W: Sequence[int], peers: Peers, unit_bytes: int
) -> trace.Collective:
    return trace.begin(
        trace.Collective(
            name=label.name,
            layer=label.layer,
            send=tuple(send_W),
            receive=tuple(receive_W),
            peers=peers.ranks,
            rank=peers.rank,
            unit_bytes=unit_bytes,
        )
    )


class PendingRows:
    """Rows on their way; `wait` once."""

    def __init__(self, record: trace.Collective, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        # what is sent must stay until it is gone
        self._record, self._work, self._sent, self._received = record, work, sent, received

    def wait(self) -> Tensor:
        """The received rows; on a GPU its present stream waits, not the host."""
        self._work.wait()
        trace.end(self._record, self._work if self._received.is_cuda else None)
        del self._sent
        return self._received


def start_all_to_all(
    rows: Tensor, send_W: Sequence[int], receive_W: Sequence[int], peers: Peers, label: Label
) -> PendingRows:
    """Start to send block r of ``rows`` to peer r.

    Args:
        rows: (sum(send_W), M) of any dtype, the blocks in group order.
        send_W: rows for each peer; zeros are fine, and every peer must call.
        receive_W: rows from each peer.
        peers: who takes part.
        label: for `moe.parallel.trace`.

    Returns:
        A handle whose `wait` gives (sum(receive_W), M), the received blocks in group order.
    """
    rows = rows.contiguous()
    received = rows.new_empty((sum(receive_W), rows.shape[1]))
    record = _announce(label, send_W, receive_W, peers, rows.shape[1] * rows.element_size())
    work = dist.all_to_all_single(
        received.view(torch.uint8),  # backends move bytes and do not know every dtype
        rows.view(torch.uint8),
        list(receive_W),
        list(send_W),
        group=peers.group,
        async_op=True,
    )
    return PendingRows(record, work, rows, received)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers that a rank sent to its peers, and what it got from them: nested lists of shape (W, ...)."""

    sent: list
    received: list


class PendingCounts:
    """Counts on their way; `wait` once."""

    def __init__(self, record: trace.Collective, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        self._record, self._work, self._sent, self._received = record, work, sent, received
        if sent.is_cuda:
            # A stream of its own brings them to the host, so that waiting for them does not wait for what is queued after.
            stream = _copy_stream(sent.device)
            stream.wait_stream(torch.cuda.current_stream(sent.device))
            with torch.cuda.stream(stream):
                work.wait()
                both = torch.stack([sent, received])
                self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
                self._host.copy_(both, non_blocking=True)
                self._copied = stream.record_event()

    def wait(self) -> Counts:
        """The counts on the host."""
        if self._sent.is_cuda:
            self._copied.synchronize()
            sent, received = self._host.tolist()
        else:
            self._work.wait()
            sent, received = self._sent.tolist(), self._received.tolist()
        trace.end(self._record)
        return Counts(sent=sent, received=received)


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def start_counts(counts_WM: Tensor, peers: Peers, label: Label) -> PendingCounts:
    """Start to send row r of ``counts_WM`` (W, ...) int64 to peer r; `wait` gives both sides on the host."""
    counts_WM = counts_WM.contiguous()
    received_WM = torch.empty_like(counts_WM)
    ones_W = [1] * len(peers)
    record = _announce(label, ones_W, ones_W, peers, counts_WM[0].numel() * counts_WM.element_size())
    work = dist.all_to_all_single(received_WM, counts_WM, group=peers.group, async_op=True)
    return PendingCounts(record, work, counts_WM, received_WM)


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum of ``tensor`` over the ranks of the group (all by default), out of place; without gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total
