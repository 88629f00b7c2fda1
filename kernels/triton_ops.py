"""The expert FFN in Triton as `torch.library` custom ops, so that autograd and ``torch.compile`` see one op each way.

Saved for backward: x, the pre-activation (unless it is to be made again), the indices and the weights' matrices. The gradient of
a combine weight is <dA, A>, so the experts' output (N, D) is neither kept nor recomputed.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels import triton_gemm as gemm
from moe.kernels.triton_launch import Launcher, combine, make_grid, precision, run_forward
from moe.kernels.triton_plan import Plan, make_plan
from moe.kernels.triton_tuning import Blocks, blocks_for
from moe.types import DEFAULT_FFN, FFNOptions, Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _descriptor(weight_EPQ: Tensor, block: list[int], blocks: Blocks) -> TensorDescriptor | None:
    """A TMA descriptor of (E, P, Q) as E * P rows; None where the card or the shapes do not allow one."""
    if not blocks.tma or not weight_EPQ.is_contiguous() or weight_EPQ.numel() == 0:
        return None
    aligned = weight_EPQ.data_ptr() % 16 == 0 and weight_EPQ.shape[2] * weight_EPQ.itemsize % 16 == 0
    if weight_EPQ.is_cuda:
        aligned = aligned and torch.cuda.get_device_capability(weight_EPQ.device) >= (9, 0)
    return TensorDescriptor.from_tensor(weight_EPQ.flatten(0, 1), block) if aligned else None


class GemmLauncher(Launcher):
    """The products and their gradients, with weights in the dtype of x."""

    def __init__(self, x_TD: Tensor, plan: Plan, w_down_EDF: Tensor, activation: str) -> None:
        num_experts, self.dim, self.width = w_down_EDF.shape
        super().__init__(x_TD, plan, num_experts, activation)
        self.height = (2 if self.gated else 1) * self.width

    def _blocks(self, kernel: str) -> Blocks:
        return blocks_for(kernel, self.num_rows, self.num_experts, self.x_TD.dtype)

    def up(self, w_up_EHD: Tensor, save_h: bool, save_a: bool = True) -> tuple[Tensor, Tensor]:
        """Pre-activation (N, H) and activation (N, F); one that is not wanted is empty."""
        blocks, x_TD = self._blocks("up"), self.x_TD
        grid, tiles = self.walk(blocks, self.width)
        h_NH = x_TD.new_empty(self.num_rows if save_h else 0, self.height)
        a_NF = x_TD.new_empty(self.num_rows if save_a else 0, self.width)
        descriptor = _descriptor(w_up_EHD, [blocks.n, blocks.k], blocks)
        gemm.up_kernel[grid](
            x_TD, w_up_EHD, descriptor or w_up_EHD, h_NH, a_NF, self.plan.token_ids_N, self.plan.offsets_E1,
            tiles.experts_M, tiles.starts_M, tiles.total_1, self.dim, self.width, x_TD.stride(0),
            GATED=self.gated, SAVE_H=save_h, SAVE_A=save_a, PRECISION=precision(x_TD.dtype),
            TMA=descriptor is not None, **blocks.meta(),
        )  # fmt: skip
        return h_NH, a_NF

    def rows(self, rows_NK: Tensor, weight_EKC: Tensor) -> Tensor:
        """Rows times their expert's (K, C) matrix: (N, C). The matrix may be a transposed view."""
        blocks, (_, depth, columns) = self._blocks("rows"), weight_EKC.shape
        grid, tiles = self.walk(blocks, columns)
        out_NC = rows_NK.new_empty(self.num_rows, columns)
        tma, descriptor = "", None
        if not weight_EKC.is_contiguous():
            tma, descriptor = "columns", _descriptor(weight_EKC.transpose(1, 2), [blocks.n, blocks.k], blocks)
        elif (
            depth % blocks.k == 0
        ):  # else a tile would bring the next expert's rows, which nothing masks if they are NaN
            tma, descriptor = "rows", _descriptor(weight_EKC, [blocks.k, blocks.n], blocks)
        gemm.rows_kernel[grid](
            rows_NK, weight_EKC, descriptor or weight_EKC, out_NC, self.plan.offsets_E1,
            tiles.experts_M, tiles.starts_M, tiles.total_1,
            columns, depth, weight_EKC.stride(0), weight_EKC.stride(2), weight_EKC.stride(1),
            PRECISION=precision(rows_NK.dtype), TMA=tma if descriptor is not None else "", **blocks.meta(),
        )  # fmt: skip
        return out_NC

    def activation(self, dy_TD: Tensor, w_down_EDF: Tensor, h_NH: Tensor, weights_N: Tensor) -> list[Tensor]:
        """dh (N, H), weight * a (N, F) and d(weight) (N,) fp32, in sorted order."""
        blocks = self._blocks("activation")
        grid, tiles = self.walk(blocks, self.width)
        dh_NH, a_NF = torch.empty_like(h_NH), h_NH.new_empty(self.num_rows, self.width)
        num_parts = triton.cdiv(self.width, blocks.n)
        dweights = torch.empty(num_parts, self.num_rows, dtype=torch.float32, device=h_NH.device)
        descriptor = _descriptor(w_down_EDF, [blocks.k, blocks.n], blocks) if self.dim % blocks.k == 0 else None
        gemm.activation_kernel[grid](
            dy_TD, w_down_EDF, descriptor or w_down_EDF,
            h_NH, weights_N, dh_NH, a_NF, dweights, self.plan.token_ids_N, self.plan.offsets_E1,
            tiles.experts_M, tiles.starts_M, tiles.total_1, self.num_rows, self.dim, self.width, dy_TD.stride(0),
            GATED=self.gated, PRECISION=precision(h_NH.dtype), TMA=descriptor is not None, **blocks.meta(),
        )  # fmt: skip
        return [dh_NH, a_NF, dweights.sum(0)]

    def weight(
        self, left: Tensor, right: Tensor, gather_left: bool, gather_right: bool, main_grad: Tensor | None
    ) -> Tensor:
        """left^T right over each expert's rows: (E, P, Q); a gathered side is (T, ...), the other (N, ...).

        With a ``main_grad`` it is added to that, and the result is empty.
        """
        blocks, rows, columns = self._blocks("weight"), left.shape[1], right.shape[1]
        out_EPQ = left.new_empty(self.num_experts, rows, columns) if main_grad is None else main_grad
        units = self.num_experts * triton.cdiv(rows, blocks.m) * triton.cdiv(columns, blocks.n)
        gemm.weight_kernel[make_grid(units, blocks, left)](
            left, right, out_EPQ, self.plan.token_ids_N, self.plan.offsets_E1,
            self.num_experts, rows, columns, left.stride(0), right.stride(0),
            GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, ACCUMULATE=main_grad is not None,
            PRECISION=precision(left.dtype), **blocks.meta(),
        )  # fmt: skip
        return out_EPQ if main_grad is None else left.new_empty(0)


@torch.library.custom_op("moe::expert_ffn", mutates_args=())
def _forward(
    x_TD: Tensor, weights_N: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, expert_ids_N: Tensor, token_ids_N: Tensor,
    top_k: int, activation: str, save: bool, main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """What `run_forward` returns. Without ``save``, h is empty and backward makes it.

    ``top_k`` is 0 where it varies from token to token. ``main_grads`` is for backward: none, or both.
    """
    with torch.cuda.device_of(x_TD):
        plan = make_plan(expert_ids_N, token_ids_N, w_up_EHD.shape[0])
        launcher = GemmLauncher(x_TD, plan, w_down_EDF, activation)
        return run_forward(
            plan, token_ids_N, weights_N, x_TD.shape[0], top_k,
            lambda: launcher.up(w_up_EHD, save), lambda a_NF: launcher.rows(a_NF, w_down_EDF.transpose(1, 2)),
        )  # fmt: skip


@_forward.register_fake
def empty_outputs(
    x_TD: Tensor, weights_N: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, expert_ids_N: Tensor, token_ids_N: Tensor,
    top_k: int, activation: str, save: bool, main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """What the op returns, without its contents."""
    num_rows, (num_experts, height) = expert_ids_N.shape[0], w_up_EHD.shape[:2]

    def ints(size: int) -> Tensor:
        return expert_ids_N.new_empty(size, dtype=torch.int32)

    indices = [ints(num_rows), ints(num_rows), ints(num_rows), ints(num_experts + 1)]
    bags = [ints(0 if top_k else num_rows), ints(0 if top_k else x_TD.shape[0] + 1)]
    h_NH = x_TD.new_empty(num_rows if save else 0, height)
    return [torch.empty_like(x_TD), h_NH, *indices, *bags, torch.empty_like(weights_N)]


def _gradients(
    dy_TD: Tensor, x_TD: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, saved: list[Tensor], top_k: int, activation: str,
    needs: list[bool], main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """dx, d(weights), dw_up, dw_down; empty where ``needs`` (x, w_up, w_down) says no or ``main_grads`` took them."""
    h_NH, order_N, position_N, tokens_N, offsets_E1, bags_N, bag_offsets, weights_N = saved
    plan = Plan(order_N=order_N, position_N=position_N, token_ids_N=tokens_N, offsets_E1=offsets_E1)
    dx_TD, dw_up_EHD, dw_down_EDF = x_TD.new_empty(0), x_TD.new_empty(0), x_TD.new_empty(0)
    main_up, main_down = main_grads or (None, None)
    with torch.cuda.device_of(x_TD):
        launcher = GemmLauncher(x_TD, plan, w_down_EDF, activation)
        if not h_NH.numel():
            h_NH, _ = launcher.up(w_up_EHD, True, False)
        dh_NH, a_NF, dweights_N = launcher.activation(dy_TD, w_down_EDF, h_NH, weights_N)
        if needs[0]:
            dx_ND = launcher.rows(dh_NH, w_up_EHD)
            dx_TD = combine(dx_ND, None, position_N if top_k else bags_N, bag_offsets, x_TD.shape[0], top_k)
        if needs[1]:
            dw_up_EHD = launcher.weight(dh_NH, x_TD, False, True, main_up)
        if needs[2]:
            dw_down_EDF = launcher.weight(dy_TD, a_NF, True, False, main_down)
    return [dx_TD, dweights_N[position_N], dw_up_EHD, dw_down_EDF]


def _like_gradients(leaves: list[Tensor], weights_N: Tensor, needs: list[bool]) -> list[Tensor]:
    """What `_gradients` returns for (x, w_up, w_down), without its contents."""
    dx, dw_up, dw_down = (
        torch.empty_like(leaf) if need else leaf.new_empty(0) for leaf, need in zip(leaves, needs, strict=True)
    )
    return [dx, torch.empty_like(weights_N), dw_up, dw_down]


@torch.library.custom_op("moe::expert_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor, x_TD: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, saved: list[Tensor], top_k: int, activation: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return _gradients(dy_TD, x_TD, w_up_EHD, w_down_EDF, saved, top_k, activation, needs, [])


@_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, saved: list[Tensor], top_k: int, activation: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return _like_gradients([x_TD, w_up_EHD, w_down_EDF], saved[-1], needs)


# An op of its own: torch.compile takes no op that both returns tensors and changes a list of them.
@torch.library.custom_op("moe::expert_ffn_backward_into", mutates_args=("main_grads",))
def _backward_into(
    dy_TD: Tensor, x_TD: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, saved: list[Tensor], top_k: int, activation: str,
    needs: list[bool], main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return _gradients(dy_TD, x_TD, w_up_EHD, w_down_EDF, saved, top_k, activation, needs, main_grads)


@_backward_into.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, saved: list[Tensor], top_k: int, activation: str,
    needs: list[bool], main_grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return _like_gradients([x_TD, w_up_EHD, w_down_EDF], saved[-1], [needs[0], False, False])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_TD, _, w_up_EHD, w_down_EDF, _, _, ctx.top_k, ctx.activation, _, ctx.main_grads = inputs
    ctx.save_for_backward(x_TD, w_up_EHD, w_down_EDF, *output[1:])


def _autograd(ctx, gradients):  # type: ignore[no-untyped-def]
    x_TD, w_up_EHD, w_down_EDF, *saved = ctx.saved_tensors
    needs_x, needs_weights, needs_up, needs_down = ctx.needs_input_grad[:4]
    tensors, needs = (gradients[0].contiguous(), x_TD, w_up_EHD, w_down_EDF, saved), [needs_x, needs_up, needs_down]
    if ctx.main_grads:
        dx, dweights, dw_up, dw_down = _backward_into(*tensors, ctx.top_k, ctx.activation, needs, ctx.main_grads)
    else:
        dx, dweights, dw_up, dw_down = _backward(*tensors, ctx.top_k, ctx.activation, needs)
    keeps = not ctx.main_grads
    given = (needs_x, needs_weights, needs_up and keeps, needs_down and keeps)
    found = [tensor if give else None for tensor, give in zip((dx, dweights, dw_up, dw_down), given, strict=True)]
    return *found, None, None, None, None, None, [None] * len(ctx.main_grads)


def register_backward(op: str) -> None:
    """The backward of "moe::expert_ffn" for an op that takes and returns the same."""
    torch.library.register_autograd(op, _autograd, setup_context=_setup_context)


register_backward("moe::expert_ffn")


def problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on such tensors; None where they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of {', '.join(str(known) for known in DTYPES)}"
    if device_type == "cpu":
        return (
            None if triton.knobs.runtime.interpret else "a CPU tensor needs Triton's interpreter (TRITON_INTERPRET=1)"
        )
    if device_type != "cuda":
        return f"device {device_type} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"compute capability {capability} is below 8.0"


def call(
    op: Callable[..., list[Tensor]],
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions,
) -> Tensor:
    """The output of one of the ops that take the arguments of "moe::expert_ffn"."""
    weights_N = routing.weights_N.float().contiguous()
    leaves = (x_TD.contiguous(), weights_N, w_up_EHD.contiguous(), w_down_EDF.contiguous())
    save = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves) and not options.recompute
    main_grads = list(options.main_grads or ())
    for buffer, weight in zip(main_grads, leaves[2:], strict=False):
        if buffer.shape != weight.shape or not buffer.is_contiguous():
            raise ValueError(
                f"a main_grad is {tuple(buffer.shape)} with strides {buffer.stride()}; "
                f"the kernels need a contiguous {tuple(weight.shape)}"
            )
    choices = (routing.expert_ids_N, routing.token_ids_N, routing.top_k or 0)
    return op(*leaves, *choices, activation, save, main_grads)[0]


def expert_ffn(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """See `ops.expert_ffn`."""
    return call(_forward, x_TD, routing, w_up_EHD, w_down_EDF, activation, options)
