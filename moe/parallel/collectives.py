"""Collectives with gradients, and the small reductions that training needs.

Legend: R rows, W ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def _exchange_rows(rows: Tensor, send_W: list[int], receive_W: list[int], group: Group) -> Tensor:
    received = rows.new_empty((sum(receive_W), *rows.shape[1:]))
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        # gloo moves bytes and knows float16, but not bfloat16 in every release that we support
        dist.all_to_all_single(
            received.view(torch.float16), rows.contiguous().view(torch.float16), receive_W, send_W, group
        )
    else:
        dist.all_to_all_single(received, rows.contiguous(), receive_W, send_W, group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_W: list[int], receive_W: list[int], group: Group) -> Tensor:
        ctx.send_W, ctx.receive_W, ctx.group = send_W, receive_W, group
        return _exchange_rows(rows, send_W, receive_W, group)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange_rows(drows, ctx.receive_W, ctx.send_W, ctx.group), None, None, None


def all_to_all(rows: Tensor, send_W: list[int], receive_W: list[int], group: Group) -> Tensor:
    """Send block r of ``rows`` to rank r of the group; differentiable.

    Args:
        rows: (sum(send_W), ...), the blocks in rank order.
        send_W: rows for each rank; zeros are fine, and every rank must call.
        receive_W: rows from each rank.
        group: the process group.

    Returns:
        (sum(receive_W), ...), the received blocks in rank order.
    """
    return _AllToAll.apply(rows, send_W, receive_W, group)


def exchange_counts(counts_WC: Tensor, group: Group) -> Tensor:
    """Row r of ``counts_WC`` (W, C) goes to rank r; returns what the ranks had for this one, (W, C). No gradient."""
    counts_WC = counts_WC.contiguous()
    received_WC = torch.empty_like(counts_WC)
    dist.all_to_all_single(received_WC, counts_WC, group=group)
    return received_WC


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum of ``tensor`` over the ranks of the group (all by default), out of place; without gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total
