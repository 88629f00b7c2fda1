"""The quantised expert FFN in Triton as `torch.library` custom ops: for inference, and the fp8 forward of training.

The forward of training rounds the weights anew in each step, one scale per output row, and the rows as inference does. Its
backward is the one of the unquantised op, at the fp8 forward's pre-activation and with the weights in their own dtype: rounding
counts as the identity (straight-through).

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments, P output rows and Q reduced columns.
"""

import torch
import triton
from torch import Tensor

from moe.kernels import triton_ops
from moe.kernels import triton_quantized as gemm
from moe.kernels.quantized import FP8, NUM_BITS, QuantizedWeight
from moe.kernels.triton_launch import Launcher, precision, run_forward
from moe.kernels.triton_plan import Plan, make_plan
from moe.kernels.triton_tuning import Blocks, rows_class
from moe.types import DEFAULT_FFN, FFNOptions, Routing

_WHOLE_ROW = 2**30  # a power of two no row is longer than: the group size where a row has one scale

# Not yet measured on a GPU: sizes that fit Hopper's registers and shared memory without spills (checked by compiling for it).
_INTEGER = {
    ("up", "many"): Blocks(m=128, n=64, k=32, stages=4),
    ("up", "some"): Blocks(m=64, n=128, k=32, stages=4),
    ("up", "few"): Blocks(m=16, n=64, k=32, warps=4, stages=4),
    ("rows", "many"): Blocks(m=128, n=128, k=32, stages=4),
    ("rows", "some"): Blocks(m=64, n=128, k=64, stages=3),
    ("rows", "few"): Blocks(m=16, n=64, k=64, warps=4, stages=4),
}
_FP8 = {
    ("up", "many"): Blocks(m=128, n=64, k=128, stages=3),
    ("up", "some"): Blocks(m=64, n=64, k=128, warps=4, stages=3),
    ("up", "few"): Blocks(m=16, n=64, k=128, warps=4, stages=4),
    ("rows", "many"): Blocks(m=128, n=128, k=128, stages=3),
    ("rows", "some"): Blocks(m=64, n=128, k=128, stages=3),
    ("rows", "few"): Blocks(m=16, n=64, k=128, warps=4, stages=4),
}
_FULL = {key: Blocks(m=16, n=32, k=32, warps=4, stages=2) for key in _INTEGER}


def blocks_for(kernel: str, scheme: str, num_rows: int, num_experts: int, dtype: torch.dtype) -> Blocks:
    """Block sizes of ``kernel`` ("up", "rows"), by rows per expert as in `triton_tuning.blocks_for`."""
    table = _FP8 if scheme == "fp8" else _INTEGER if dtype.itemsize <= 2 else _FULL
    return table[kernel, rows_class(num_rows, num_experts)]


def quantize_rows(rows_nQ: Tensor) -> tuple[Tensor, Tensor]:
    """`quantized.quantize_rows` in one pass over contiguous rows."""
    num_rows, num_columns = rows_nQ.shape
    out_nQ = torch.empty(num_rows, num_columns, dtype=FP8, device=rows_nQ.device)
    scale_n = torch.empty(num_rows, dtype=torch.float32, device=rows_nQ.device)
    if num_rows:
        block = min(triton.next_power_of_2(num_columns), 4096)
        gemm.quantize_rows_kernel[(num_rows,)](rows_nQ, out_nQ, scale_n, num_columns, BLOCK=block, num_warps=4)
    return out_nQ, scale_n


class _QuantizedLauncher(Launcher):
    """Both products, with quantised weights."""

    def __init__(self, x_TD: Tensor, plan: Plan, scheme: str, num_experts: int, activation: str) -> None:
        super().__init__(x_TD, plan, num_experts, activation)
        self.scheme = scheme

    def _blocks(self, kernel: str) -> Blocks:
        return blocks_for(kernel, self.scheme, self.num_rows, self.num_experts, self.x_TD.dtype)

    def _rounded(self, rows_nQ: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as the kernels take them, and their scales; these are not read for integer weights."""
        return quantize_rows(rows_nQ) if self.scheme == "fp8" else (rows_nQ, rows_nQ)

    def _meta(self, weight: QuantizedWeight, blocks: Blocks) -> dict[str, object]:
        """Keyword arguments of both kernels."""
        zero_point, num_bits = weight.zero_point, NUM_BITS.get(weight.scheme, 0)
        return {
            "words": weight.packed.shape[2],
            "groups": weight.scale.shape[2],
            "stride_we": weight.packed.stride(0),
            "stride_se": weight.scale.stride(0),
            "stride_ze": 0 if zero_point is None else zero_point.stride(0),
            "BITS": num_bits,
            "GROUP": weight.group_size or (_WHOLE_ROW if num_bits else 0),
            "ASYMMETRIC": zero_point is not None,
            "PRECISION": precision(self.x_TD.dtype),
            **blocks.meta(),
        }

    def up(self, weight: QuantizedWeight, save_h: bool) -> tuple[Tensor, Tensor]:
        """Pre-activation (N, H), or an empty tensor, and activation (N, F), both in the dtype of x."""
        height = weight.shape[1]
        width = height // 2 if self.gated else height
        blocks = self._blocks("up")
        grid, tiles = self.walk(blocks, width)
        h_NH = self.x_TD.new_empty(self.num_rows if save_h else 0, height)
        a_NF = self.x_TD.new_empty(self.num_rows, width)
        x_TD, x_scale_T = self._rounded(self.x_TD)
        zero_point = weight.packed if weight.zero_point is None else weight.zero_point
        gemm.up_kernel[grid](
            x_TD, x_scale_T, weight.packed, weight.scale, zero_point, h_NH, a_NF, self.plan.token_ids_N,
            self.plan.offsets_E1, tiles.experts_M, tiles.starts_M, tiles.total_1, x_TD.shape[1], width,
            GATED=self.gated, SAVE_H=save_h, **self._meta(weight, blocks),
        )  # fmt: skip
        return h_NH, a_NF

    def rows(self, rows_NQ: Tensor, weight: QuantizedWeight) -> Tensor:
        """Rows times their expert's matrix, transposed: (N, P)."""
        _, columns, depth = weight.shape
        blocks = self._blocks("rows")
        grid, tiles = self.walk(blocks, columns)
        out_NP = rows_NQ.new_empty(self.num_rows, columns)
        rows_NQ, row_scale_N = self._rounded(rows_NQ)
        zero_point = weight.packed if weight.zero_point is None else weight.zero_point
        gemm.rows_kernel[grid](
            rows_NQ, row_scale_N, weight.packed, weight.scale, zero_point, out_NP, self.plan.offsets_E1,
            tiles.experts_M, tiles.starts_M, tiles.total_1, columns, depth, **self._meta(weight, blocks),
        )  # fmt: skip
        return out_NP


def _run(
    x_TD: Tensor, weights_N: Tensor, up: QuantizedWeight, down: QuantizedWeight, expert_ids_N: Tensor,
    token_ids_N: Tensor, top_k: int, activation: str, save: bool,
) -> list[Tensor]:  # fmt: skip
    """What `run_forward` returns."""
    plan = make_plan(expert_ids_N, token_ids_N, up.shape[0])
    launcher = _QuantizedLauncher(x_TD, plan, up.scheme, up.shape[0], activation)
    return run_forward(
        plan, token_ids_N, weights_N, x_TD.shape[0], top_k,
        lambda: launcher.up(up, save), lambda a_NF: launcher.rows(a_NF, down),
    )  # fmt: skip


def _weight(parts: list[Tensor], scheme: str, num_columns: int, group_size: int) -> QuantizedWeight:
    packed, scale, *zero_point = parts
    return QuantizedWeight(
        scheme=scheme,
        shape=(packed.shape[0], packed.shape[1], num_columns),
        packed=packed,
        scale=scale,
        group_size=group_size or None,
        zero_point=zero_point[0] if zero_point else None,
    )


@torch.library.custom_op("moe::expert_ffn_quantized", mutates_args=())
def _quantized(
    x_TD: Tensor, weights_N: Tensor, up: list[Tensor], down: list[Tensor], expert_ids_N: Tensor, token_ids_N: Tensor,
    top_k: int, activation: str, scheme: str, up_group: int, down_group: int,
) -> Tensor:  # fmt: skip
    """y (T, D). Weights are [packed, scale] or [packed, scale, zero_point]; group sizes are 0 for one scale per row."""
    height = up[0].shape[1]
    width = height // 2 if activation == "swiglu" else height
    with torch.cuda.device_of(x_TD):
        return _run(
            x_TD, weights_N, _weight(up, scheme, x_TD.shape[1], up_group), _weight(down, scheme, width, down_group),
            expert_ids_N, token_ids_N, top_k, activation, False,
        )[0]  # fmt: skip


@_quantized.register_fake
def _(
    x_TD: Tensor, weights_N: Tensor, up: list[Tensor], down: list[Tensor], expert_ids_N: Tensor, token_ids_N: Tensor,
    top_k: int, activation: str, scheme: str, up_group: int, down_group: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x_TD)


def _rounded_weight(weight_EPQ: Tensor) -> QuantizedWeight:
    num_experts, num_rows, num_columns = weight_EPQ.shape
    packed, scale = quantize_rows(weight_EPQ.flatten(0, 1))
    return QuantizedWeight(
        scheme="fp8",
        shape=(num_experts, num_rows, num_columns),
        packed=packed.view_as(weight_EPQ),
        scale=scale.view(num_experts, num_rows, 1),
    )


@torch.library.custom_op("moe::expert_ffn_fp8", mutates_args=())
def _fp8(
    x_TD: Tensor, weights_N: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, expert_ids_N: Tensor, token_ids_N: Tensor,
    top_k: int, activation: str, save: bool, main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """As "moe::expert_ffn" in arguments and results, with both products in fp8."""
    with torch.cuda.device_of(x_TD):
        up, down = _rounded_weight(w_up_EHD), _rounded_weight(w_down_EDF)
        return _run(x_TD, weights_N, up, down, expert_ids_N, token_ids_N, top_k, activation, save)


_fp8.register_fake(triton_ops.empty_outputs)
triton_ops.register_backward("moe::expert_ffn_fp8")


def problem(device_type: str, scheme: str) -> str | None:
    """Why ``scheme`` cannot run where other Triton kernels can; None where it can."""
    if scheme == "fp8" and device_type == "cuda" and (capability := torch.cuda.get_device_capability()) < (8, 9):
        return f"fp8 needs compute capability 8.9, this card has {capability[0]}.{capability[1]}"
    return None


def _parts(weight: QuantizedWeight) -> list[Tensor]:
    tensors = (weight.packed, weight.scale, weight.zero_point)
    return [tensor.contiguous() for tensor in tensors if tensor is not None]


def expert_ffn_quantized(
    x_TD: Tensor, routing: Routing, up: QuantizedWeight, down: QuantizedWeight, activation: str
) -> Tensor:
    """See `ops.expert_ffn_quantized`."""
    return _quantized(
        x_TD.contiguous(), routing.weights_N.float().contiguous(), _parts(up), _parts(down),
        routing.expert_ids_N, routing.token_ids_N, routing.top_k or 0, activation, up.scheme,
        up.group_size or 0, down.group_size or 0,
    )  # fmt: skip


@torch.library.custom_op("moe::linear_quantized", mutates_args=())
def _linear(x_nQ: Tensor, weight: list[Tensor], scheme: str, group_size: int) -> Tensor:
    """(n, P); ``weight`` as of "moe::expert_ffn_quantized"."""
    num_rows, device = x_nQ.shape[0], x_nQ.device
    positions_n = torch.arange(num_rows, dtype=torch.int32, device=device)
    offsets_E1 = torch.arange(2, dtype=torch.int32, device=device) * num_rows
    plan = Plan(order_N=positions_n, position_N=positions_n, token_ids_N=positions_n, offsets_E1=offsets_E1)
    with torch.cuda.device_of(x_nQ):
        launcher = _QuantizedLauncher(x_nQ, plan, scheme, 1, "gelu")
        return launcher.rows(x_nQ, _weight(weight, scheme, x_nQ.shape[1], group_size))


@_linear.register_fake
def _(x_nQ: Tensor, weight: list[Tensor], scheme: str, group_size: int) -> Tensor:
    return x_nQ.new_empty(x_nQ.shape[0], weight[0].shape[1])


def linear_quantized(x_nQ: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.linear_quantized`: the second product of the FFN with one expert, which gets all rows."""
    return _linear(x_nQ.contiguous(), _parts(weight), weight.scheme, weight.group_size or 0)


def expert_ffn_fp8(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """`ops.expert_ffn` with its forward in fp8 and its backward unchanged; arguments and gradients as there."""
    return triton_ops.call(_fp8, x_TD, routing, w_up_EHD, w_down_EDF, activation, options)
