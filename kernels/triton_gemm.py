"""The grouped matrix products of the expert FFN, with gathers in their loads and activations in their epilogues.

Five kernels, after SonicMoE (arXiv 2512.14080, sections 3 and 4), of which each is one pass over the sorted rows:

    up          h = x[token] W_up^T, a = act(h)          gathers x while it loads; never makes a permuted copy of it
    rows        out = rows W                             down-projection y = a W_down^T, and its mirror dx = dh W_up
    activation  dA = dy[token] W_down; dh, weight * a and d(weight) = <dA, a>, with a recomputed from h
    weight      dW = left^T right over an expert's rows  gathers dy or x along the reduced dimension

Row tiles never hold two experts, so a tile multiplies with one weight matrix only. Programs walk over tiles: a grid as large as
the number of tiles gives each program one; a smaller grid makes them persistent. Weights come through the tensor memory
accelerator (TMA) where it applies: a descriptor of all experts' rows below each other, whose tiles may reach into the next
expert's rows; what they bring from there meets zeros or is not stored. Sums are in fp32, and nothing is added with
atomics, so results are the same on every run.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N sorted rows, M row tiles.
"""

import triton
import triton.language as tl

from moe.kernels.triton_tiles import dot, gelu, halves, place, store_up


@triton.jit
def up_kernel(
    x_ptr, w_ptr, w_desc, h_ptr, a_ptr, tokens_ptr, offsets_ptr, experts_ptr, starts_ptr, total_ptr,
    D, F, stride_x,
    GATED: tl.constexpr, SAVE_H: tl.constexpr, SAVE_A: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h (N, H) and a (N, F) of sorted rows, or one of the two. ``w`` is (E, H, D): the gate's F rows, then the up-projection's."""
    num_m = tl.load(total_ptr)
    num_n = tl.cdiv(F, BLOCK_N)
    height = 2 * F if GATED else F
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = place(tile, num_m, num_n, GROUP_M)
        expert, start = tl.load(experts_ptr + m), tl.load(starts_ptr + m)
        stop = tl.load(offsets_ptr + expert + 1)
        row = start + tl.arange(0, BLOCK_M)
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(tokens_ptr + row, mask=row < stop, other=0).to(tl.int64)
        x_at = x_ptr + token[:, None] * stride_x
        w_at = w_ptr + expert.to(tl.int64) * height * D + ((col % F) * D)[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            at = k + k_range
            x = tl.load(x_at + at[None, :], mask=at[None, :] < D, other=0.0)
            if TMA:
                w = w_desc.load([expert * height + n * BLOCK_N, k]).T
            else:
                w = tl.load(w_at + at[:, None], mask=at[:, None] < D, other=0.0)
            gate = dot(x, w, gate, PRECISION)
            if GATED:
                if TMA:
                    w_up = w_desc.load([expert * height + F + n * BLOCK_N, k]).T
                else:
                    w_up = tl.load(w_at + F * D + at[:, None], mask=at[:, None] < D, other=0.0)
                up = dot(x, w_up, up, PRECISION)
        # In halves: two whole accumulators and the activation would not fit the registers.
        gate_0, gate_1 = halves(gate)
        up_0, up_1 = halves(up)
        half = n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        store_up(gate_0, up_0, h_ptr, a_ptr, row, row < stop, half, F, GATED, SAVE_H, SAVE_A)
        half += BLOCK_N // 2
        store_up(gate_1, up_1, h_ptr, a_ptr, row, row < stop, half, F, GATED, SAVE_H, SAVE_A)


@triton.jit
def rows_kernel(
    rows_ptr, w_ptr, w_desc, out_ptr, offsets_ptr, experts_ptr, starts_ptr, total_ptr,
    C, K, stride_we, stride_wn, stride_wk,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (N, C) = rows (N, K) times each expert's (K, C) matrix, given by its strides."""
    num_m = tl.load(total_ptr)
    num_n = tl.cdiv(C, BLOCK_N)
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = place(tile, num_m, num_n, GROUP_M)
        expert, start = tl.load(experts_ptr + m), tl.load(starts_ptr + m)
        stop = tl.load(offsets_ptr + expert + 1)
        row = start + tl.arange(0, BLOCK_M)
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_row = tl.where(row < stop, row, start).to(tl.int64)
        a_at = rows_ptr + safe_row[:, None] * K
        w_at = w_ptr + expert.to(tl.int64) * stride_we + ((col % C) * stride_wn)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            at = k + k_range
            a = tl.load(a_at + at[None, :], mask=at[None, :] < K, other=0.0)
            if TMA == "columns":  # a matrix stored column by column
                w = w_desc.load([expert * C + n * BLOCK_N, k]).T
            elif TMA == "rows":
                w = w_desc.load([expert * K + k, n * BLOCK_N])
            else:
                w = tl.load(w_at + (at * stride_wk)[:, None], mask=at[:, None] < K, other=0.0)
            acc = dot(a, w, acc, PRECISION)
        out = (row < stop)[:, None] & (col < C)[None, :]
        out_at = out_ptr + row[:, None].to(tl.int64) * C + col[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out)


@triton.jit
def _activation_half(da, h_ptr, dh_ptr, a_ptr, weight, row, inside, col, F, GATED: tl.constexpr):
    """Epilogue of `activation_kernel` on some columns: stores dh and weight * a, returns these columns' part of d(weight)."""
    height = 2 * F if GATED else F
    out = inside[:, None] & (col < F)[None, :]
    h_at = row[:, None].to(tl.int64) * height + col[None, :]
    weight = weight[:, None]
    if GATED:
        gate = tl.load(h_ptr + h_at, mask=out, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + h_at + F, mask=out, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        a = silu * up
        weighted = weight * da
        dgate = weighted * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(dh_ptr + h_at, dgate.to(dh_ptr.dtype.element_ty), mask=out)
        tl.store(dh_ptr + h_at + F, (weighted * silu).to(dh_ptr.dtype.element_ty), mask=out)
    else:
        h = tl.load(h_ptr + h_at, mask=out, other=0.0).to(tl.float32)
        a = gelu(h)
        cdf = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        tl.store(dh_ptr + h_at, (weight * da * (cdf + h * density)).to(dh_ptr.dtype.element_ty), mask=out)
    a_at = row[:, None].to(tl.int64) * F + col[None, :]
    tl.store(a_ptr + a_at, (weight * a).to(a_ptr.dtype.element_ty), mask=out)
    # Columns past F repeat others (the weights' loads stay inside by col % F), so they must not count.
    return tl.sum(tl.where(out, da * a, 0.0), axis=1)


@triton.jit
def activation_kernel(
    dy_ptr, w_ptr, w_desc, h_ptr, weights_ptr, dh_ptr, a_ptr, dweights_ptr,
    tokens_ptr, offsets_ptr, experts_ptr, starts_ptr, total_ptr,
    N, D, F, stride_dy,
    GATED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Backward through down-projection and activation: dh (N, H), weight * a (N, F), and d(weight) in parts.

    Each column tile writes its own part of d(weight), row ``n`` of (num_n, N); adding them up later keeps the order fixed.
    """
    num_m = tl.load(total_ptr)
    num_n = tl.cdiv(F, BLOCK_N)
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = place(tile, num_m, num_n, GROUP_M)
        expert, start = tl.load(experts_ptr + m), tl.load(starts_ptr + m)
        stop = tl.load(offsets_ptr + expert + 1)
        row = start + tl.arange(0, BLOCK_M)
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(tokens_ptr + row, mask=row < stop, other=0).to(tl.int64)
        dy_at = dy_ptr + token[:, None] * stride_dy
        w_at = w_ptr + expert.to(tl.int64) * D * F + (col % F)[None, :]
        da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            at = k + k_range
            dy = tl.load(dy_at + at[None, :], mask=at[None, :] < D, other=0.0)
            if TMA:
                w = w_desc.load([expert * D + k, n * BLOCK_N])
            else:
                w = tl.load(w_at + (at * F)[:, None], mask=at[:, None] < D, other=0.0)
            da = dot(dy, w, da, PRECISION)
        inside = row < stop
        weight = tl.load(weights_ptr + row, mask=inside, other=0.0)
        # In halves: the whole tile with its gate, up-projection and results would not fit the registers.
        da_0, da_1 = halves(da)
        half = n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        dweight = _activation_half(da_0, h_ptr, dh_ptr, a_ptr, weight, row, inside, half, F, GATED)
        dweight += _activation_half(da_1, h_ptr, dh_ptr, a_ptr, weight, row, inside, half + BLOCK_N // 2, F, GATED)
        tl.store(dweights_ptr + n.to(tl.int64) * N + row, dweight, mask=inside)


@triton.jit
def weight_kernel(
    left_ptr, right_ptr, out_ptr, tokens_ptr, offsets_ptr,
    E, P, Q, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (E, P, Q) = left^T right over each expert's rows, or plus that; an expert without rows gets zeros.

    One of the sides may be rows of tokens, gathered while loading.
    """
    num_m, num_n = tl.cdiv(P, BLOCK_M), tl.cdiv(Q, BLOCK_N)
    k_range = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        expert = tile // (num_m * num_n)
        m, n = place(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        p, q = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(start, stop, BLOCK_K):
            row = first + k_range
            inside = row < stop
            left_row, right_row = row.to(tl.int64), row.to(tl.int64)
            if GATHER_LEFT:
                left_row = tl.load(tokens_ptr + row, mask=inside, other=0).to(tl.int64)
            if GATHER_RIGHT:
                right_row = tl.load(tokens_ptr + row, mask=inside, other=0).to(tl.int64)
            left_at = left_ptr + left_row[None, :] * stride_left + (p % P)[:, None]
            right_at = right_ptr + right_row[:, None] * stride_right + (q % Q)[None, :]
            left = tl.load(left_at, mask=inside[None, :], other=0.0)
            right = tl.load(right_at, mask=inside[:, None], other=0.0)
            acc = dot(left, right, acc, PRECISION)
        out_at = out_ptr + expert.to(tl.int64) * P * Q + p[:, None].to(tl.int64) * Q + q[None, :]
        out = (p < P)[:, None] & (q < Q)[None, :]
        if ACCUMULATE:
            acc += tl.load(out_at, mask=out, other=0.0).to(tl.float32)
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out)


@triton.jit
def _weighted_row(rows_ptr, weights_ptr, bag_ptr, d, D, WEIGHTED: tl.constexpr):
    row = tl.load(bag_ptr).to(tl.int64)
    value = tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights_ptr + row)
    return value


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, bags_ptr, bag_offsets_ptr, out_ptr, D,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of the rows of token t, times their weights if there are any; fp32 sums in the order of the list."""
    token, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    if TOP_K > 0:
        bag_ptr = bags_ptr + token.to(tl.int64) * TOP_K
        for k in tl.static_range(TOP_K):  # unrolled, so that all rows are on their way at once
            acc += _weighted_row(rows_ptr, weights_ptr, bag_ptr + k, d, D, WEIGHTED)
    else:
        for n in range(tl.load(bag_offsets_ptr + token), tl.load(bag_offsets_ptr + token + 1)):
            acc += _weighted_row(rows_ptr, weights_ptr, bags_ptr + n, d, D, WEIGHTED)
    tl.store(out_ptr + token.to(tl.int64) * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
