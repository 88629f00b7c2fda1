"""Quantised expert weights: how they are stored, rounding to nearest, and the expert FFN on them in plain torch.

Three schemes, named as servers name them:

    w4a16, w8a16   integer weights, activations in their own dtype; one scale per output row and group of the reduced dimension
    fp8            e4m3 weights and e4m3 activations; one scale per output row or 128 x 128 block, and one per row of activations

Integers are stored as a compressed-tensors checkpoint of format "pack-quantized" stores them, the experts stacked: see
`pack_int32`. So a checkpoint's tensors are stacked and used, and ours can be written as they are.

`expert_ffn_quantized` is the oracle of the fused kernels and the path of every device without them. It takes whatever can multiply
rows by one of its matrices: a `QuantizedWeight` dequantises one matrix at a time; on CPU, weights in the layout of torch's own
kernels (`moe.kernels.quantized_cpu`) do not.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments, r rows of one expert, P output rows
and Q reduced columns of a weight, G groups of Q.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.kernels.grouped import sort_by_expert
from moe.kernels.reference import activate, with_main_grads
from moe.kernels.rounding import integer_codes, integer_scales, positive_scale
from moe.types import DEFAULT_FFN, FFNOptions, Routing

NUM_BITS = {"w4a16": 4, "w8a16": 8}  # of the integer schemes
SCHEMES = (*NUM_BITS, "fp8")
GROUP_SIZES: dict[str, tuple[int | None, ...]] = {
    "w4a16": (None, 32, 64, 128),
    "w8a16": (None, 32, 64, 128),
    "fp8": (None, 128),
}
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _check_scheme(scheme: str, group_size: int | None, num_columns: int) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown; use one of {list(SCHEMES)}")
    if group_size not in GROUP_SIZES[scheme]:
        known = ", ".join(str(size) for size in GROUP_SIZES[scheme])
        raise ValueError(
            f"group_size={group_size} is not offered for {scheme}; use one of {known} (None: a scale per row)"
        )
    if scheme in NUM_BITS and group_size is not None and num_columns % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {num_columns} columns of the weight; "
            "use a divisor, or None for one scale per row"
        )


def num_bytes(*tensors: Tensor | None) -> int:
    """Memory of tensors, in bytes."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)


class Multiplier(Protocol):
    """A stack of quantised matrices in some layout."""

    @property
    def scheme(self) -> str:
        """One of `SCHEMES`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, P, Q)."""

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, in bytes."""

    def product(self, rows_rQ: Tensor, expert: int) -> Tensor:
        """Rows times one expert's matrix, transposed: (r, P), in the dtype of the rows, for fp8 in fp32."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A stack of quantised matrices, one per expert, as a checkpoint stores them.

    Attributes:
        scheme: "w4a16", "w8a16" or "fp8".
        shape: (E, P, Q) of the weight that it stands for.
        packed: (E, P, ceil(Q * bits / 32)) int32 as `pack_int32` makes it; for fp8 (E, P, Q) float8_e4m3fn.
        scale: (E, P, G), any floating dtype; fp8 by blocks: (E, ceil(P / 128), ceil(Q / 128)).
        group_size: columns that share a scale, Q / G; ``None`` where a row has one (G = 1). For fp8, 128 means 128 x 128 blocks.
        zero_point: (E, ceil(P * bits / 32), G) int32, packed along P; ``None`` where zero is in the middle of the range.
    """

    scheme: str
    shape: tuple[int, int, int]
    packed: Tensor
    scale: Tensor
    group_size: int | None = None
    zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        num_experts, num_rows, num_columns = self.shape
        _check_scheme(self.scheme, self.group_size, num_columns)
        dtype, num_words, num_groups = FP8, num_columns, 1
        if self.scheme in NUM_BITS:
            dtype, num_words = torch.int32, _ceil_div(num_columns * NUM_BITS[self.scheme], 32)
            num_groups = num_columns // self.group_size if self.group_size else 1
        elif self.group_size:
            num_rows, num_groups = _ceil_div(num_rows, self.group_size), _ceil_div(num_columns, self.group_size)
        self._check("packed", self.packed, (num_experts, self.shape[1], num_words), dtype)
        self._check("scale", self.scale, (num_experts, num_rows, num_groups), self.scale.dtype)
        if not self.scale.is_floating_point():
            raise ValueError(f"scale has dtype {self.scale.dtype}; it must be floating point")
        if self.zero_point is not None:
            if self.scheme not in NUM_BITS:
                raise ValueError(f"zero_point is set, but {self.scheme} is symmetric; leave it out")
            packed_rows = _ceil_div(num_rows * NUM_BITS[self.scheme], 32)
            self._check("zero_point", self.zero_point, (num_experts, packed_rows, num_groups), torch.int32)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; scheme {self.scheme} with group_size={self.group_size} of "
                f"shape {self.shape} needs {shape} {dtype}"
            )
        if tensor.device != self.packed.device:
            raise ValueError(f"{name} is on {tensor.device}, packed on {self.packed.device}; move them to one device")

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return num_bytes(self.packed, self.scale, self.zero_point)

    def expert(self, expert: int) -> "QuantizedWeight":
        """A view of one expert's matrix, as a stack of one."""
        here = slice(expert, expert + 1)
        return QuantizedWeight(
            scheme=self.scheme,
            shape=(1, *self.shape[1:]),
            packed=self.packed[here],
            scale=self.scale[here],
            group_size=self.group_size,
            zero_point=None if self.zero_point is None else self.zero_point[here],
        )

    def product(self, rows_rQ: Tensor, expert: int) -> Tensor:
        """See `Multiplier`; the matrix is dequantised."""
        if self.scheme == "fp8":
            return _fp8_product(rows_rQ, dequantize(self.expert(expert), torch.float32)[0])
        return rows_rQ @ dequantize(self.expert(expert), rows_rQ.dtype)[0].T


def pack_int32(codes: Tensor, num_bits: int, dim: int = -1) -> Tensor:
    """Pack signed integers of 2 to 8 bits into int32 words along ``dim``, as compressed-tensors 0.20 does.

    As its ``pack_to_int32`` (compressors/pack_quantized/helpers.py) has it, 2 ** (bits - 1) is added to make codes unsigned, the
    first code takes the lowest bits of a word, codes that do not fit go on in the next word, and bits past the end are 0.
    Weights are packed along the columns, zero points along the rows.

    Args:
        codes: (..., n, ...) integers in [-2 ** (bits - 1), 2 ** (bits - 1)).

    Returns:
        (..., ceil(n * bits / 32), ...) int32, contiguous.
    """
    size, (num_codes, num_words) = codes.shape[dim], _period(num_bits)
    unsigned = codes.movedim(dim, -1).to(torch.int32) + (1 << (num_bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -size % num_codes)).unflatten(-1, (-1, num_codes))
    words = unsigned.new_zeros(*unsigned.shape[:-1], num_words)
    for i in range(num_codes):
        word, shift = divmod(i * num_bits, 32)
        words[..., word] |= unsigned[..., i] << shift
        if shift + num_bits > 32:
            words[..., word + 1] |= unsigned[..., i] >> (32 - shift)
    words = words.flatten(-2)[..., : _ceil_div(size * num_bits, 32)].movedim(-1, dim)
    return words.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps odd strides of dimensions of size 1


def unpack_int32(words: Tensor, num_bits: int, size: int, dim: int = -1) -> Tensor:
    """The ``size`` signed integers along ``dim`` that `pack_int32` packed; int8."""
    num_codes, num_words = _period(num_bits)
    words = words.movedim(dim, -1)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % num_words)).unflatten(-1, (-1, num_words))
    codes = torch.empty(*words.shape[:-1], num_codes, dtype=torch.int8, device=words.device)
    for i in range(num_codes):
        word, shift = divmod(i * num_bits, 32)
        unsigned = words[..., word] >> shift
        if shift + num_bits > 32:
            unsigned = unsigned & ((1 << (32 - shift)) - 1) | words[..., word + 1] << (32 - shift)
        codes[..., i] = (unsigned & ((1 << num_bits) - 1)) - (1 << (num_bits - 1))
    return codes.flatten(-2)[..., :size].movedim(-1, dim)


def _period(num_bits: int) -> tuple[int, int]:
    """How many codes fill how many words without a gap."""
    shared = math.gcd(num_bits, 32)
    return 32 // shared, num_bits // shared


def _integer_parts(weight_PQ: Tensor, num_bits: int, group_size: int | None, symmetric: bool) -> dict[str, Tensor]:
    groups_PGg = weight_PQ.float().unflatten(1, (-1, group_size or weight_PQ.shape[1]))
    scale_PG, zero_PG = integer_scales(groups_PGg, num_bits, symmetric, weight_PQ.dtype)
    # The codes belong to the scale as it is stored, after its rounding to the weight's dtype.
    zero_PG1 = None if zero_PG is None else zero_PG[..., None]
    codes_PGg = integer_codes(groups_PGg, scale_PG.float()[..., None], zero_PG1, num_bits)
    parts = {"packed": pack_int32(codes_PGg.flatten(1), num_bits), "scale": scale_PG}
    return parts if zero_PG is None else parts | {"zero_point": pack_int32(zero_PG, num_bits, dim=0)}


def quantize_rows(rows_nQ: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fp8 with a scale each: (n, Q) float8_e4m3fn, and (n,) fp32 with rows = codes * scale."""
    rows_nQ = rows_nQ.float()
    most_n = rows_nQ.abs().amax(-1) if rows_nQ.shape[1] else rows_nQ.new_zeros(rows_nQ.shape[0])
    scale_n = torch.where(most_n == 0, 1.0, most_n / FP8_MAX)
    return (rows_nQ / scale_n[:, None]).to(FP8), scale_n


def _fp8_parts(weight_PQ: Tensor, group_size: int | None) -> dict[str, Tensor]:
    if group_size is None:
        packed_PQ, scale_P = quantize_rows(weight_PQ)
        return {"packed": packed_PQ, "scale": scale_P[:, None]}
    (num_rows, num_columns), size = weight_PQ.shape, group_size
    padded = torch.nn.functional.pad(weight_PQ.float(), (0, -num_columns % size, 0, -num_rows % size))
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (P / 128, 128, Q / 128, 128)
    scale = positive_scale(blocks.abs().amax((1, 3)) / FP8_MAX, torch.float32, FP8_MAX)
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:num_rows, :num_columns]
    return {"packed": codes.to(FP8), "scale": scale}


@torch.no_grad()
def quantize_weight(
    weight_EPQ: Tensor, scheme: str, group_size: int | None = None, symmetric: bool = True
) -> QuantizedWeight:
    """Round a stack of weights to the nearest values of a scheme.

    Args:
        weight_EPQ: (E, P, Q) floating, finite; Q is the reduced dimension.
        scheme: "w4a16", "w8a16" or "fp8".
        group_size: columns that share a scale: 32, 64, 128, or ``None`` for one scale per row. For fp8, 128 is 128 x 128 blocks.
        symmetric: False stores a zero point per scale, for integers only.

    Returns:
        Scales of integers are in the weight's dtype, as compressed-tensors stores them; those of fp8 in fp32.

    Raises:
        ValueError: the scheme, the group size or the shape do not fit, or a weight is not finite.
    """
    if weight_EPQ.dim() != 3 or not weight_EPQ.is_floating_point():
        raise ValueError(
            f"weight is {tuple(weight_EPQ.shape)} {weight_EPQ.dtype}; it must be (E, P, Q) and floating point"
        )
    _check_scheme(scheme, group_size, weight_EPQ.shape[2])
    if 0 in weight_EPQ.shape:
        raise ValueError(f"weight has shape {tuple(weight_EPQ.shape)}; there is nothing to quantise")
    if scheme == "fp8" and not symmetric:
        raise ValueError("symmetric=False is not offered for fp8; use 'w4a16' or 'w8a16'")
    num_experts, num_rows, num_columns = weight_EPQ.shape
    parts: list[dict[str, Tensor]] = []
    for expert, weight_PQ in enumerate(weight_EPQ):  # one at a time: the fp32 copies of a whole bank would not fit
        if not weight_PQ.isfinite().all():
            raise ValueError(f"weight of expert {expert} has values that are not finite; check the checkpoint")
        if scheme == "fp8":
            parts.append(_fp8_parts(weight_PQ, group_size))
        else:
            parts.append(_integer_parts(weight_PQ, NUM_BITS[scheme], group_size, symmetric))
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return QuantizedWeight(scheme=scheme, shape=(num_experts, num_rows, num_columns), group_size=group_size, **stacked)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(E, P, Q) in ``dtype``: code * scale, rounded once. For one expert: ``dequantize(weight.expert(e), dtype)[0]``."""
    _, num_rows, num_columns = weight.shape
    exact = torch.promote_types(dtype, torch.float32)
    scale = weight.scale.to(exact)
    if weight.scheme == "fp8":
        if weight.group_size:
            scale = scale.repeat_interleave(weight.group_size, 1)[:, :num_rows]
            scale = scale.repeat_interleave(weight.group_size, 2)[:, :, :num_columns]
        return (weight.packed.to(exact) * scale).to(dtype)
    num_bits = NUM_BITS[weight.scheme]
    codes_EPGg = unpack_int32(weight.packed, num_bits, num_columns).to(exact).unflatten(2, (scale.shape[2], -1))
    if weight.zero_point is not None:
        codes_EPGg = codes_EPGg - unpack_int32(weight.zero_point, num_bits, num_rows, dim=1).to(exact)[..., None]
    return (codes_EPGg * scale[..., None]).flatten(2).to(dtype)


def _fp8_product(rows_rQ: Tensor, weight_PQ: Tensor) -> Tensor:
    """Rows, rounded to fp8, times a matrix of values that fp8 holds: (r, P) fp32."""
    codes_rQ, scale_r = quantize_rows(rows_rQ)
    return codes_rQ.float() @ weight_PQ.T * scale_r[:, None]


def expert_ffn_quantized(x_TD: Tensor, routing: Routing, up: Multiplier, down: Multiplier, activation: str) -> Tensor:
    """See `ops.expert_ffn_quantized`."""
    order = sort_by_expert(routing)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert, start, stop in order.blocks:
        token_ids_r = order.token_ids_N[start:stop]
        a_rF = activate(up.product(x_TD[token_ids_r], expert), activation).to(x_TD.dtype)
        weights_r1 = routing.weights_N[order.order_N[start:stop], None].to(y_TD.dtype)
        y_TD.index_add_(0, token_ids_r, down.product(a_rF, expert).to(y_TD.dtype) * weights_r1)
    return y_TD.to(x_TD.dtype)


def linear_quantized(x_nQ: Tensor, weight: Multiplier) -> Tensor:
    """See `ops.linear_quantized`."""
    return weight.product(x_nQ, 0).to(x_nQ.dtype)


def check_pair(x_TD: Tensor, up: Multiplier, down: Multiplier, activation: str) -> None:
    """Raise a ValueError unless the two weights make an expert FFN of ``x_TD``."""
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation={activation!r} is unknown; use 'swiglu' or 'gelu'")
    (num_experts, height, dim), factor = up.shape, 2 if activation == "swiglu" else 1
    if up.scheme != down.scheme:
        raise ValueError(f"up has scheme {up.scheme!r}, down {down.scheme!r}; quantise both alike")
    if height % factor or down.shape != (num_experts, dim, height // factor) or x_TD.shape[1] != dim:
        raise ValueError(
            f"x of width {x_TD.shape[1]}, up {up.shape} and down {down.shape} do not fit each other with {activation}; "
            f"up must be (E, {'2F' if factor == 2 else 'F'}, D) and down (E, D, F)"
        )


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        raise RuntimeError(
            "quantised weights have no backward: quantised experts are for inference; call the model under "
            "torch.no_grad(), or train the model they were made from"
        )


def inference_only(run: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
    """The result of ``run`` on these inputs without a gradient; whoever asks it for one gets an error that says so."""
    with torch.no_grad():
        y = run()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Inference.apply(y, *inputs)
    return y


def _rounding_error(rows_rQ: Tensor, weight_PQ: Tensor, exact_rP: Tensor) -> Tensor:
    """What rounding both operands to fp8 adds to their product; a constant to autograd."""
    with torch.no_grad():
        codes_PQ, scale_P = quantize_rows(weight_PQ)
        return _fp8_product(rows_rQ, codes_PQ.float() * scale_P[:, None]).to(exact_rP.dtype) - exact_rP


def expert_ffn_fp8(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """`ops.expert_ffn` whose products are of operands rounded to fp8, one scale per row and per output row.

    The value of each product is the fp8 one and its derivatives are those of the exact one (straight-through, arXiv 1308.3432).
    """
    weights = with_main_grads(w_up_EHD, w_down_EDF, options)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in range(w_up_EHD.shape[0]):
        picked_n = (routing.expert_ids_N == expert).nonzero().squeeze(-1)
        token_ids_n = routing.token_ids_N[picked_n]
        weights_n1 = routing.weights_N[picked_n, None].to(y_TD.dtype)
        x_nD = x_TD[token_ids_n]
        h_nH = x_nD @ weights.up_EHD[expert].T
        a_nF = activate(h_nH + _rounding_error(x_nD, w_up_EHD[expert], h_nH), activation)
        out_nD = a_nF @ weights.down_EDF[expert].T
        error_nD = _rounding_error(a_nF, w_down_EDF[expert], out_nD)
        # Apart, so that the weight's gradient too is the exact product's: the fused backward does not keep the other one.
        out_nD = out_nD.to(y_TD.dtype) * weights_n1 + error_nD.to(y_TD.dtype) * weights_n1.detach()
        y_TD = y_TD.index_add(0, token_ids_n, out_nD)
    return y_TD.to(x_TD.dtype)
