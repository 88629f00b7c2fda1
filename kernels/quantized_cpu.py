"""Integer weights in the layout of torch's CPU kernels, and products with them.

torch has two kernels for x86 that multiply bf16 rows by integers without writing a dequantised matrix anywhere:

    _weight_int8pack_mm          int8 codes (P, Q) and one scale per row; reads 16 columns at a time from addresses that it takes to
                                 be aligned, so a width that 16 does not divide gives wrong numbers or a crash (torch 2.13)
    _weight_int4pack_mm_for_cpu  4-bit codes packed for the machine's vector width, scales and zeros of groups of 32 to 256
                                 columns; P a multiple of 16

They win where a matrix is read for few rows, as in decoding. Their time grows with every row, while that of dequantising does not:
from some number of rows on a matrix is dequantised and multiplied as any other. So is every matrix that a kernel does not take (a
width of 19, 8-bit groups or zero points), and rows in another dtype, for which the kernels are plain loops and slower than that.

A weight is repacked once, expert by expert, and takes the place of the checkpoint's layout: it is as large but for a copy of the
scales. `rows` is the way back.

Legend: E experts, P output rows, Q reduced columns, G groups of Q, g columns of a group, r rows of the input.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.kernels.expert_threads import for_each_expert
from moe.kernels.grouped import _Scratch, _sum_by_token, sort_by_expert
from moe.kernels.quantized import Multiplier, QuantizedWeight, num_bytes, pack_int32, unpack_int32
from moe.kernels.reference import activate
from moe.types import Routing

# Above this many rows a dequantised matrix wins; measured on a Xeon with AMX, where bf16 products are fast.
MOST_ROWS = {8: 12, 4: 40}
_KERNEL_GROUPS = (256, 128, 64, 32)  # of the 4-bit kernel
_scratch = _Scratch()  # dequantised matrices, whose fresh pages would cost more than their numbers
_ALIGNMENT = 64  # bytes; of the 8-bit kernel's loads the widest has 32
_HAS_KERNELS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # elsewhere they are plain loops


def kernel_problem(weight: QuantizedWeight) -> str | None:
    """Why decoding with a weight does not use a kernel of torch; ``None`` where it does."""
    _, num_rows, num_columns = weight.shape
    if not _HAS_KERNELS:
        return "torch's kernels are for AVX2 and AVX-512"
    if weight.scheme == "w8a16":
        if weight.group_size is not None or weight.zero_point is not None:
            return "the 8-bit kernel has one scale per row and no zero points"
        if num_columns % 16:
            return f"the 8-bit kernel needs a multiple of 16 columns, not {num_columns}"
        return None if _runs_int8() else "torch's 8-bit kernel does not run here"
    if weight.scheme == "w4a16":
        if num_rows % 16 or num_columns % _KERNEL_GROUPS[-1]:
            return f"the 4-bit kernel needs a multiple of 16 rows and of 32 columns, not {num_rows} x {num_columns}"
        return None if _int4_layout() is not None else "torch's 4-bit kernel does not run here"
    return f"torch has no CPU kernel for {weight.scheme}"


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """A stack of 8-bit matrices.

    Attributes:
        codes_EPQ: int8.
        scale_EPG: as in the checkpoint.
        zero_EPG: int8, or ``None``.
        group_size: as in `QuantizedWeight`.
        kernel_scale_EP: bf16 scales for the kernel; ``None`` where it does not take the weight.
    """

    scheme = "w8a16"
    codes_EPQ: Tensor
    scale_EPG: Tensor
    zero_EPG: Tensor | None
    group_size: int | None
    kernel_scale_EP: Tensor | None

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> "Int8Weight":
        """From the checkpoint's layout."""
        _, num_rows, num_columns = weight.shape
        codes_EPQ = torch.empty(weight.shape, dtype=torch.int8)
        for codes_PQ, words in zip(codes_EPQ, weight.packed, strict=True):
            codes_PQ.copy_(unpack_int32(words, 8, num_columns))
        takes = kernel_problem(weight) is None
        return cls(
            codes_EPQ=codes_EPQ,
            scale_EPG=weight.scale,
            zero_EPG=None if weight.zero_point is None else unpack_int32(weight.zero_point, 8, num_rows, dim=1),
            group_size=weight.group_size,
            kernel_scale_EP=weight.scale[..., 0].bfloat16().contiguous() if takes else None,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, P, Q)."""
        num_experts, num_rows, num_columns = self.codes_EPQ.shape
        return num_experts, num_rows, num_columns

    @property
    def num_bytes(self) -> int:
        """See `quantized.Multiplier`."""
        return num_bytes(self.codes_EPQ, self.scale_EPG, self.zero_EPG, self.kernel_scale_EP)

    def rows(self) -> QuantizedWeight:
        """The checkpoint's layout again, exactly."""
        zero = self.zero_EPG
        return QuantizedWeight(
            scheme=self.scheme,
            shape=self.shape,
            packed=torch.stack([pack_int32(codes_PQ, 8) for codes_PQ in self.codes_EPQ]),
            scale=self.scale_EPG,
            group_size=self.group_size,
            zero_point=None if zero is None else pack_int32(zero, 8, dim=1),
        )

    def product(self, rows_rQ: Tensor, expert: int) -> Tensor:
        """See `quantized.Multiplier`."""
        codes_PQ = self.codes_EPQ[expert]
        if self.kernel_scale_EP is not None and _is_for_kernel(rows_rQ, 8):
            return torch.ops.aten._weight_int8pack_mm(_aligned(rows_rQ), codes_PQ, self.kernel_scale_EP[expert])
        dtype, scale_PG = rows_rQ.dtype, self.scale_EPG[expert].to(rows_rQ.dtype)
        weight_PQ = _scratch.take("codes", rows_rQ, *codes_PQ.shape).copy_(codes_PQ)
        if (
            self.group_size is None and self.zero_EPG is None and dtype != torch.float16
        ):  # whose range the sums may leave
            return (rows_rQ @ weight_PQ.T).mul_(scale_PG[:, 0])
        groups_PGg = weight_PQ.unflatten(1, (scale_PG.shape[1], -1))
        if self.zero_EPG is not None:
            groups_PGg.sub_(self.zero_EPG[expert].to(dtype)[..., None])
        groups_PGg.mul_(scale_PG[..., None])
        return rows_rQ @ weight_PQ.T


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """A stack of 4-bit matrices.

    Attributes:
        words_EPq: (E, P, Q / 2) uint8, two codes each, in the kernel's order.
        scale_EGP: the checkpoint's, transposed; where it is bf16, a view of ``kernel_scales``.
        zero_EGP: int8, or ``None``.
        group_size: as in `QuantizedWeight`.
        kernel_scales: (E, Q / g, P, 2) bf16, scale and what is added to a product of code and scale. A scale per row is there
            for each of the groups that the kernel is told.
    """

    scheme = "w4a16"
    words_EPq: Tensor
    scale_EGP: Tensor
    zero_EGP: Tensor | None
    group_size: int | None
    kernel_scales: Tensor

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> "Int4Weight":
        """From the checkpoint's layout, which `kernel_problem` takes."""
        num_experts, num_rows, num_columns = weight.shape
        words_EPq = torch.empty(num_experts, num_rows, num_columns // 2, dtype=torch.uint8)
        for words_Pq, words in zip(words_EPq, weight.packed, strict=True):
            words_Pq.copy_(_pack_int4(unpack_int32(words, 4, num_columns)))
        scale_EGP = weight.scale.transpose(1, 2)
        zero_EGP, added_EGP = None, torch.zeros_like(scale_EGP)
        if weight.zero_point is not None:
            zero_EGP = unpack_int32(weight.zero_point, 4, num_rows, dim=1).transpose(1, 2).contiguous()
            added_EGP = -zero_EGP * scale_EGP
        kernel_scales = torch.stack((scale_EGP, added_EGP), -1).bfloat16()
        if weight.group_size is None:
            kernel_scales = kernel_scales.repeat(1, num_columns // _kernel_group(num_columns), 1, 1)
        if scale_EGP.dtype == torch.bfloat16:
            scale_EGP = kernel_scales[:, : scale_EGP.shape[1], :, 0]
        return cls(
            words_EPq=words_EPq,
            scale_EGP=scale_EGP,
            zero_EGP=zero_EGP,
            group_size=weight.group_size,
            kernel_scales=kernel_scales,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, P, Q)."""
        num_experts, num_rows, half = self.words_EPq.shape
        return num_experts, num_rows, 2 * half

    @property
    def num_bytes(self) -> int:
        """See `quantized.Multiplier`."""
        own_scale = None if self.scale_EGP.dtype == torch.bfloat16 else self.scale_EGP
        return num_bytes(self.words_EPq, own_scale, self.zero_EGP, self.kernel_scales)

    def rows(self) -> QuantizedWeight:
        """The checkpoint's layout again, exactly."""
        layout, zero = _int4_layout(), self.zero_EGP
        assert layout is not None, "packed without a kernel"
        _, num_rows, num_columns = self.shape
        codes_QP = torch.empty(num_columns, num_rows, dtype=torch.int8)
        return QuantizedWeight(
            scheme=self.scheme,
            shape=self.shape,
            packed=torch.stack([pack_int32(layout.unpack(words, codes_QP).T, 4) for words in self.words_EPq]),
            scale=self.scale_EGP.transpose(1, 2).contiguous(),
            group_size=self.group_size,
            zero_point=None if zero is None else pack_int32(zero.transpose(1, 2), 4, dim=1),
        )

    def product(self, rows_rQ: Tensor, expert: int) -> Tensor:
        """See `quantized.Multiplier`."""
        words_Pq = self.words_EPq[expert]
        if _is_for_kernel(rows_rQ, 4):
            scales = self.kernel_scales[expert]
            group_size = rows_rQ.shape[1] // scales.shape[0]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(_aligned(rows_rQ), words_Pq, group_size, scales)
        layout, dtype = _int4_layout(), rows_rQ.dtype
        assert layout is not None, "packed without a kernel"
        weight_QP = layout.unpack(words_Pq, _scratch.take("codes", rows_rQ, rows_rQ.shape[1], words_Pq.shape[0]))
        scale_GP = self.scale_EGP[expert].to(dtype).contiguous()
        groups_GgP = weight_QP.unflatten(0, (scale_GP.shape[0], -1))
        if self.zero_EGP is not None:
            groups_GgP.sub_(self.zero_EGP[expert].to(dtype)[:, None])
        groups_GgP.mul_(scale_GP[:, None])
        return rows_rQ @ weight_QP


CpuWeight = Int8Weight | Int4Weight


def for_cpu(weight: QuantizedWeight) -> CpuWeight | None:
    """The same weight in a layout that is fast on CPU; ``None`` where there is none (fp8, 4 bits in sizes that no kernel takes)."""
    if weight.scheme == "w8a16":
        return Int8Weight.pack(weight)
    if weight.scheme == "w4a16" and kernel_problem(weight) is None:
        return Int4Weight.pack(weight)
    return None


def expert_ffn_quantized(x_TD: Tensor, routing: Routing, up: Multiplier, down: Multiplier, activation: str) -> Tensor:
    """`quantized.expert_ffn_quantized` with the sum over experts, and threads for many rows, of `grouped.expert_ffn`."""
    order = sort_by_expert(routing)
    exact = torch.promote_types(x_TD.dtype, torch.float32)
    rows_ND = x_TD.new_empty(order.order_N.numel(), x_TD.shape[1], dtype=exact)

    def run_expert(expert: int, start: int, stop: int) -> None:
        x_rD = x_TD[order.token_ids_N[start:stop]]
        a_rF = activate(up.product(x_rD, expert), activation).to(x_TD.dtype)
        rows_ND[start:stop] = down.product(a_rF, expert)

    for_each_expert(order.blocks, x_TD.device, run_expert)
    weights_N = routing.weights_N[order.order_N]
    return _sum_by_token(rows_ND, order, weights_N[order.bags_N]).to(x_TD.dtype)


def _is_for_kernel(rows_rQ: Tensor, num_bits: int) -> bool:
    return rows_rQ.dtype == torch.bfloat16 and 0 < rows_rQ.shape[0] <= MOST_ROWS[num_bits]


def _aligned(rows_rQ: Tensor) -> Tensor:
    """Contiguous rows at an address that vector loads take."""
    rows_rQ = rows_rQ.contiguous()
    return rows_rQ.clone() if rows_rQ.data_ptr() % _ALIGNMENT else rows_rQ


def _kernel_group(num_columns: int) -> int:
    """The largest group that the 4-bit kernel takes and that divides a row."""
    return next(size for size in _KERNEL_GROUPS if num_columns % size == 0)


def _pack_int4(codes_PQ: Tensor) -> Tensor:
    """(P, Q / 2) uint8 from int8 codes."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_PQ.to(torch.int32) + 8, 1)


@dataclass(frozen=True, kw_only=True)
class _Int4Layout:
    """The order in which torch packs 4-bit codes, which depends on the machine: blocks of rows, column by column.

    Attributes:
        block: rows of a full block; what is left at the end is a smaller one.
        halves: a byte of a full block holds rows i and i + block / 2, else, as in a smaller one, two neighbours.
    """

    block: int
    halves: bool

    def unpack(self, words_Pq: Tensor, codes_QP: Tensor) -> Tensor:
        """Fill and return ``codes_QP``, of any dtype: the codes of a matrix, transposed as they lie."""
        num_columns, num_rows = codes_QP.shape
        words, full = words_Pq.flatten(), num_rows // self.block * self.block
        for rows, size, halves in (
            (slice(0, full), self.block, self.halves),
            (slice(full, num_rows), num_rows - full, False),
        ):
            if rows.start == rows.stop:
                continue
            part = words[rows.start * num_columns // 2 : rows.stop * num_columns // 2].view(-1, num_columns, size // 2)
            part = part.transpose(0, 1).contiguous()  # while it is small
            low, high = (bits.view(torch.int8) - 8 for bits in (part & 15, part >> 4))
            out = codes_QP[:, rows].unflatten(1, (-1, 2, size // 2) if halves else (-1, size // 2, 2))
            at = 2 if halves else 3
            out.select(at, 0).copy_(low)
            out.select(at, 1).copy_(high)
        return codes_QP


@functools.cache
def _int4_layout() -> _Int4Layout | None:
    """How this machine's kernel packs; ``None`` where the kernel is missing or computes something else than we think."""
    index_PQ = torch.arange(144 * 64).view(144, 64)
    codes_PQ = (index_PQ * 40503 >> 7).remainder(16).sub(8).to(torch.int8)  # no two rows alike
    scales = torch.tensor([0.5, 0.25], dtype=torch.bfloat16).expand(2, 144, 2).contiguous()
    rows_rQ = torch.eye(5, 64, dtype=torch.bfloat16)
    try:
        words = _pack_int4(codes_PQ)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_rQ, words, 32, scales)
    except (AttributeError, RuntimeError):  # no such op, or not on this machine
        return None
    if not torch.equal(found.float(), codes_PQ.T[:5] * 0.5 + 0.25):
        return None
    candidates = (_Int4Layout(block=block, halves=halves) for block in (64, 32, 16) for halves in (True, False))
    return next(
        (each for each in candidates if torch.equal(each.unpack(words, torch.empty_like(codes_PQ.T)), codes_PQ.T)), None
    )


@functools.cache
def _runs_int8() -> bool:
    """Whether the kernel is there and computes what we think."""
    codes_PQ = torch.arange(7 * 32).view(7, 32).sub(100).to(torch.int8)
    try:
        found = torch.ops.aten._weight_int8pack_mm(
            torch.eye(5, 32, dtype=torch.bfloat16), codes_PQ, torch.full((7,), 0.5, dtype=torch.bfloat16)
        )
    except (AttributeError, RuntimeError):  # as above
        return False
    return torch.equal(found.float(), codes_PQ.T[:5] * 0.5)
