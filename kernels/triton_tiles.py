"""What the expert FFN's kernels are made of, whatever their weights: order of tiles, products, activations, storing an activation.

Legend: D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N sorted rows.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column tile of the n-th unit of work: GROUP_M row tiles share the columns' weights in the L2 cache."""
    in_group = GROUP_M * num_n
    first = tile // in_group * GROUP_M
    rows = min(num_m - first, GROUP_M)
    within = tile % in_group
    return first + within % rows, within // rows


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b."""
    if INTERPRETED:  # Triton 3.9's interpreter keeps bf16 as its 16-bit pattern and would multiply that
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def gelu(x):
    """The exact (erf) one."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    cols: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, cols // 2)), (0, 2, 1)))


@triton.jit
def store_up(
    gate, up, h_ptr, a_ptr, row, inside, col, F, GATED: tl.constexpr, SAVE_H: tl.constexpr, SAVE_A: tl.constexpr
):  # fmt: skip
    """Epilogue of the up-projection on some columns: stores h, act(h), or both."""
    out = inside[:, None] & (col < F)[None, :]
    height = 2 * F if GATED else F
    h_at = h_ptr + row[:, None].to(tl.int64) * height + col[None, :]
    if SAVE_H:
        tl.store(h_at, gate.to(h_ptr.dtype.element_ty), mask=out)
    if GATED:
        if SAVE_H:
            tl.store(h_at + F, up.to(h_ptr.dtype.element_ty), mask=out)
        a = silu(gate) * up
    else:
        a = gelu(gate)
    if SAVE_A:
        a_at = a_ptr + row[:, None].to(tl.int64) * F + col[None, :]
        tl.store(a_at, a.to(a_ptr.dtype.element_ty), mask=out)
