"""Grouped matrix products with quantised weights, for inference; fp8 also for the forward of training.

The same two products as `triton_gemm`, over the same tiles of sorted rows:

    up     h = x[token] W_up^T, a = act(h)     gathers x while it loads
    rows   out = rows W^T                      the down-projection

The weight's tile is the left operand and the rows' tile the right one, the other way round than there: integers are unpacked in
registers, from which Hopper's tensor cores take the left operand only; and an expert with few rows then fills the narrow side of
the instruction (from 8) and not the wide one (64).

Integers (BITS is 4 or 8) become code * scale in the dtype of x, rounded once, so results are those of the dequantised weights.
For fp8 (BITS is 0) both operands are e4m3. Its products are summed over one step of the reduced dimension in the tensor core,
which keeps fewer bits than fp32 there, and the steps in fp32 (as DeepSeek-V3 does, arXiv 2412.19437 section 3.3).

Rows are rounded to fp8 by a kernel of their own. A row's scale needs the whole row before its first product: in the gather it would
be found again for each column tile, and the up-projection's epilogue sees a part of the columns only.

Legend: T tokens, D model, F expert FFN, E experts, N sorted rows, M row tiles, P output rows and Q reduced columns of a weight.
"""

import triton
import triton.language as tl

from moe.kernels.triton_tiles import INTERPRETED, dot, halves, place, store_up


@triton.jit
def _to_fp8(value):
    """fp32 within fp8's range to e4m3, to the nearest, ties to even."""
    if (
        INTERPRETED
    ):  # Triton 3.9's loses the carry when rounding reaches the next power of two: leave it nothing to round
        bits = value.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
        small = (value + 24576.0) - 24576.0  # fp32 there has steps of 2 ** -9, as e4m3 has below 2 ** -6
        value = tl.where(tl.abs(value) < 0.015625, small, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def quantize_rows_kernel(rows_ptr, out_ptr, scale_ptr, C, BLOCK: tl.constexpr):
    """fp8 of (n, C), a program per row, and the row's scale: its largest value becomes fp8's largest."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), tl.float32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, C, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + row * C + col, mask=col < C, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
        nans |= (value != value).to(tl.int32)
    scale = tl.div_rn(tl.max(most, axis=0), 448.0)
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(tl.max(nans, axis=0) > 0, float("nan"), scale)  # a maximum passes NaN by
    tl.store(scale_ptr + row, scale)
    for first in range(0, C, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + row * C + col, mask=col < C, other=0.0).to(tl.float32)
        # Correctly rounded like torch's division, so that both paths give the same codes.
        tl.store(out_ptr + row * C + col, _to_fp8(tl.div_rn(value, scale)), mask=col < C)


@triton.jit
def _integers(
    w_ptr, scale_ptr, zero_ptr, row, k, words, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dequantised (rows, BLOCK_K) from column k on; fp32. Columns past the end hold anything finite."""
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = 2**BITS - 1
    ROWS: tl.constexpr = row.shape[0]
    PARTS: tl.constexpr = BLOCK_K // GROUP if GROUP < BLOCK_K else 1  # groups in a tile
    word = k // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    packed = tl.load(w_ptr + row[:, None] * words + word[None, :], mask=word[None, :] < words, other=0)
    shift = tl.arange(0, PER_WORD) * BITS
    codes = (packed[:, :, None] >> shift[None, None, :]) & MASK
    codes = tl.reshape(codes, (ROWS, PARTS, BLOCK_K // PARTS))
    group = k // GROUP + tl.arange(0, PARTS)
    inside = group[None, :] < groups
    scale = tl.load(scale_ptr + row[:, None] * groups + group[None, :], mask=inside, other=0.0).to(tl.float32)
    if ASYMMETRIC:
        zeros = tl.load(zero_ptr + (row // PER_WORD)[:, None] * groups + group[None, :], mask=inside, other=0)
        codes -= ((zeros >> ((row % PER_WORD) * BITS)[:, None]) & MASK)[:, :, None]
    else:
        codes -= 2 ** (BITS - 1)
    return tl.reshape(codes.to(tl.float32) * scale[:, :, None], (ROWS, BLOCK_K))


@triton.jit
def _step(
    acc, x, w_ptr, scale_ptr, zero_ptr, row, k, words, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (rows of w, rows of x) plus the products of BLOCK_K columns from k on."""
    if BITS:
        w = _integers(w_ptr, scale_ptr, zero_ptr, row, k, words, groups, BITS, GROUP, ASYMMETRIC, BLOCK_K)
        acc = dot(w.to(x.dtype), x, acc, PRECISION)
    else:
        at = k + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + row[:, None] * words + at[None, :], mask=at[None, :] < words, other=0.0)
        part = dot(w, x, tl.zeros_like(acc), PRECISION)
        if GROUP:  # a block of GROUP x GROUP; BLOCK_K divides GROUP
            part *= tl.load(scale_ptr + row // GROUP * groups + k // GROUP).to(tl.float32)[:, None]
        acc += part
    return acc


@triton.jit
def _scaled(acc, scale_ptr, x_scale_ptr, row, x_row, BITS: tl.constexpr, GROUP: tl.constexpr):
    """What is left to do after the last step: fp8's scales of whole rows."""
    if not BITS:
        if not GROUP:
            acc *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
        acc *= tl.load(x_scale_ptr + x_row)[None, :]
    return acc


@triton.jit
def up_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, h_ptr, a_ptr,
    tokens_ptr, offsets_ptr, experts_ptr, starts_ptr, total_ptr,
    D, F, words, groups, stride_we, stride_se, stride_ze,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr,
    GATED: tl.constexpr, SAVE_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h (N, H) if asked and a (N, F) of sorted rows; x is (T, D), for fp8 with a scale per token."""
    num_m = tl.load(total_ptr)
    num_n = tl.cdiv(F, BLOCK_N)
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = place(tile, num_m, num_n, GROUP_M)
        expert, start = tl.load(experts_ptr + m).to(tl.int64), tl.load(starts_ptr + m)
        stop = tl.load(offsets_ptr + expert + 1)
        row = start + tl.arange(0, BLOCK_M)
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(tokens_ptr + row, mask=row < stop, other=0).to(tl.int64)
        x_at = x_ptr + token[:, None] * D
        w_at, scale_at, zero_at = w_ptr + expert * stride_we, scale_ptr + expert * stride_se, zero_ptr
        if ASYMMETRIC:
            zero_at += expert * stride_ze
        w_row = col % F
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(0, D, BLOCK_K):
            at = k + k_range
            x = tl.load(x_at + at[None, :], mask=at[None, :] < D, other=0.0).T
            gate = _step(
                gate, x, w_at, scale_at, zero_at, w_row, k, words, groups, BITS, GROUP, ASYMMETRIC, PRECISION, BLOCK_K
            )
            if GATED:
                up = _step(
                    up, x, w_at, scale_at, zero_at, F + w_row, k, words, groups,
                    BITS, GROUP, ASYMMETRIC, PRECISION, BLOCK_K,
                )  # fmt: skip
        gate = _scaled(gate, scale_at, x_scale_ptr, w_row, token, BITS, GROUP)
        if GATED:
            up = _scaled(up, scale_at, x_scale_ptr, F + w_row, token, BITS, GROUP)
        # In halves: two whole accumulators and the activation would not fit the registers.
        gate_0, gate_1 = halves(gate.T)
        up_0, up_1 = halves(up.T)
        half = n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        store_up(gate_0, up_0, h_ptr, a_ptr, row, row < stop, half, F, GATED, SAVE_H, True)
        store_up(gate_1, up_1, h_ptr, a_ptr, row, row < stop, half + BLOCK_N // 2, F, GATED, SAVE_H, True)


@triton.jit
def rows_kernel(
    rows_ptr, row_scale_ptr, w_ptr, scale_ptr, zero_ptr, out_ptr, offsets_ptr, experts_ptr, starts_ptr, total_ptr,
    C, K, words, groups, stride_we, stride_se, stride_ze,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (N, C) = rows (N, K) times each expert's (C, K) matrix, transposed."""
    num_m = tl.load(total_ptr)
    num_n = tl.cdiv(C, BLOCK_N)
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = place(tile, num_m, num_n, GROUP_M)
        expert, start = tl.load(experts_ptr + m).to(tl.int64), tl.load(starts_ptr + m)
        stop = tl.load(offsets_ptr + expert + 1)
        row = start + tl.arange(0, BLOCK_M)
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_row = tl.where(row < stop, row, start).to(tl.int64)
        a_at = rows_ptr + safe_row[:, None] * K
        w_at, scale_at, zero_at = w_ptr + expert * stride_we, scale_ptr + expert * stride_se, zero_ptr
        if ASYMMETRIC:
            zero_at += expert * stride_ze
        w_row = col % C
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(0, K, BLOCK_K):
            at = k + k_range
            a = tl.load(a_at + at[None, :], mask=at[None, :] < K, other=0.0).T
            acc = _step(
                acc, a, w_at, scale_at, zero_at, w_row, k, words, groups, BITS, GROUP, ASYMMETRIC, PRECISION, BLOCK_K
            )
        acc = _scaled(acc, scale_at, row_scale_ptr, w_row, safe_row, BITS, GROUP).T
        out = (row < stop)[:, None] & (col < C)[None, :]
        out_at = out_ptr + row[:, None].to(tl.int64) * C + col[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out)
