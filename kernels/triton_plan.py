"""Sorting assignments by expert and cutting them into tiles, on the device and without waiting for it.

A counting sort in four launches: histograms of blocks, their running sums per expert, offsets, and a scatter. It is stable and uses
no atomics, so the order is the same on every run. Everything after it reads offsets and tiles from device memory: the host
knows only how many assignments there are, and an upper bound for the number of tiles.

Legend: N assignments, E experts, J blocks of assignments, M row tiles (upper bound), T tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # assignments per program of the sort; a program compares all pairs of its block
_CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Assignments sorted by expert; all int32 and on the device.

    Attributes:
        order_N: sorted position -> assignment.
        position_N: assignment -> sorted position.
        token_ids_N: token of each sorted position.
        offsets_E1: (E + 1,) first sorted position of each expert, and N.
    """

    order_N: Tensor
    position_N: Tensor
    token_ids_N: Tensor
    offsets_E1: Tensor


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Row tiles of at most ``rows`` sorted positions of one expert each; int32, on the device.

    Attributes:
        rows: rows of a full tile.
        experts_M: (M,) expert of each tile.
        starts_M: (M,) its first sorted position.
        total_1: (1,) how many of the M tiles exist.
    """

    rows: int
    experts_M: Tensor
    starts_M: Tensor
    total_1: Tensor


@triton.jit
def _histogram_kernel(ids_ptr, hist_ptr, N, E, BLOCK: tl.constexpr, E_POW2: tl.constexpr):
    """Assignments of each expert in one block: row ``pid`` of hist (J, E)."""
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, E_POW2)
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int32)
    counts = tl.histogram(ids, E_POW2, mask=n < N)
    tl.store(hist_ptr + block.to(tl.int64) * E + e, counts, mask=e < E)


@triton.jit
def _running_sum_kernel(hist_ptr, counts_ptr, J, E, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr):
    """In place, hist[j, e] becomes the sum of earlier blocks; counts[e] the total."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, J, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        at = hist_ptr + j[:, None].to(tl.int64) * E + e[None, :]
        inside = (j[:, None] < J) & (e[None, :] < E)
        counts = tl.load(at, mask=inside, other=0)
        sums = tl.cumsum(counts, axis=0)
        tl.store(at, sums - counts + total[None, :], mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + e, total, mask=e < E)


@triton.jit
def _scatter_kernel(
    ids_ptr, tokens_ptr, hist_ptr, offsets_ptr, order_ptr, position_ptr, sorted_tokens_ptr, N, E,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each assignment goes to: its expert's offset + those of earlier blocks + those before it in its own block."""
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + n, mask=n < N, other=-1).to(tl.int32)
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, BLOCK, CHUNK):
        other = block * BLOCK + first + tl.arange(0, CHUNK)
        other_ids = tl.load(ids_ptr + other, mask=other < N, other=-2).to(tl.int32)
        before = (other_ids[None, :] == ids[:, None]) & (other[None, :] < n[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
    inside = n < N
    base = tl.load(hist_ptr + block.to(tl.int64) * E + ids, mask=inside, other=0)
    position = tl.load(offsets_ptr + ids, mask=inside, other=0) + base + rank
    tl.store(position_ptr + n, position, mask=inside)
    tl.store(order_ptr + position, n, mask=inside)
    tl.store(sorted_tokens_ptr + position, tl.load(tokens_ptr + n, mask=inside, other=0).to(tl.int32), mask=inside)


@triton.jit
def _offsets_kernel(counts_ptr, offsets_ptr, E, E_POW2: tl.constexpr):
    e = tl.arange(0, E_POW2)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)
    tl.store(offsets_ptr + e + 1, tl.cumsum(counts, axis=0), mask=e < E)
    tl.store(offsets_ptr + e, tl.zeros((E_POW2,), tl.int32), mask=e == 0)


@triton.jit
def _tiles_kernel(
    offsets_ptr, experts_ptr, starts_ptr, total_ptr, E, ROWS: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program e lists the tiles of expert e, after those of all experts before it."""
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
    stops = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    num_tiles = tl.cdiv(stops - starts, ROWS)
    first = tl.sum(tl.where(e < expert, num_tiles, 0))
    own = tl.sum(tl.where(e == expert, num_tiles, 0))
    start = tl.sum(tl.where(e == expert, starts, 0))
    for done in range(0, own, BLOCK):
        tile = done + tl.arange(0, BLOCK)
        tl.store(experts_ptr + first + tile, tl.zeros((BLOCK,), tl.int32) + expert, mask=tile < own)
        tl.store(starts_ptr + first + tile, start + tile * ROWS, mask=tile < own)
    if expert == E - 1:
        tl.store(total_ptr, first + own)


def make_plan(expert_ids_N: Tensor, token_ids_N: Tensor, num_experts: int) -> Plan:
    """Sort assignments by expert, stably; nothing here waits for the device.

    Args:
        expert_ids_N, token_ids_N: (N,) integers; N below 2**31.
        num_experts: E.
    """
    num_assignments, device = expert_ids_N.numel(), expert_ids_N.device
    assert num_assignments < 2**31, f"{num_assignments} assignments do not fit 32 bits"

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    plan = Plan(
        order_N=ints(num_assignments),
        position_N=ints(num_assignments),
        token_ids_N=ints(num_assignments),
        offsets_E1=torch.zeros(num_experts + 1, dtype=torch.int32, device=device),
    )
    if num_assignments == 0:
        return plan
    expert_ids_N, token_ids_N = expert_ids_N.contiguous(), token_ids_N.contiguous()
    num_blocks, padded = triton.cdiv(num_assignments, BLOCK), triton.next_power_of_2(num_experts)
    hist_JE, counts_E = ints(num_blocks, num_experts), ints(num_experts)
    _histogram_kernel[(num_blocks,)](
        expert_ids_N, hist_JE, num_assignments, num_experts, BLOCK=BLOCK, E_POW2=max(padded, 2)
    )
    columns = min(padded, 16)
    _running_sum_kernel[(triton.cdiv(num_experts, columns),)](
        hist_JE, counts_E, num_blocks, num_experts, BLOCK_J=64, BLOCK_E=columns
    )
    _offsets_kernel[(1,)](counts_E, plan.offsets_E1, num_experts, E_POW2=padded)
    _scatter_kernel[(num_blocks,)](
        expert_ids_N, token_ids_N, hist_JE, plan.offsets_E1, plan.order_N, plan.position_N, plan.token_ids_N,
        num_assignments, num_experts, BLOCK=BLOCK, CHUNK=_CHUNK,
    )  # fmt: skip
    return plan


def make_tiles(plan: Plan, rows: int) -> Tiles:
    """Cut the sorted rows into tiles of one expert each; at most N // rows + E of them."""
    num_experts, num_assignments = plan.offsets_E1.numel() - 1, plan.order_N.numel()
    most = num_assignments // rows + min(num_experts, num_assignments)
    device = plan.offsets_E1.device
    tiles = Tiles(
        rows=rows,
        experts_M=torch.empty(most, dtype=torch.int32, device=device),
        starts_M=torch.empty(most, dtype=torch.int32, device=device),
        total_1=torch.empty(1, dtype=torch.int32, device=device),
    )
    _tiles_kernel[(num_experts,)](
        plan.offsets_E1, tiles.experts_M, tiles.starts_M, tiles.total_1, num_experts,
        ROWS=rows, E_POW2=triton.next_power_of_2(num_experts), BLOCK=128,
    )  # fmt: skip
    return tiles
