"""The expert FFN by sorted rows: one matmul per non-empty expert and a hand-written backward, in plain torch.

This is the product on CPU and the path of any device without a faster kernel. Rows are sorted by expert, so each expert
is a contiguous block. Saved for backward are only x, the pre-activation and the indices, as in SonicMoE
(arXiv 2512.14080, section 3): the activation is recomputed, and the gradient of a combine weight is
<dA, A> with dA = dy W_down, so the (N, D) output of the experts is never kept.

What large allocations cost decides much on CPU: a fresh buffer of tens of MB is paid for in page faults on each call.
Hence buffers that do not outlive the call come from a per-thread scratch store.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments, r rows of one expert.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.expert_threads import for_each_expert
from moe.kernels.reference import with_main_grads
from moe.types import DEFAULT_FFN, FFNOptions, Routing


class _Scratch(threading.local):
    """Buffers reused from call to call, one set per thread; contents are undefined between calls."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        key = (name, like.device, like.dtype)
        numel = shape[0] * shape[1]
        flat = self._flat.get(key)
        if flat is None or flat.numel() < numel:
            with torch.inference_mode(False):  # one made in inference mode could not be written to in training
                self._flat[key] = flat = torch.empty(numel, device=like.device, dtype=like.dtype)
        return flat[:numel].view(shape)


_scratch = _Scratch()


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Assignments sorted by expert, and the way back.

    Attributes:
        order_N: (N,) int64, sorted position -> assignment.
        token_ids_N: (N,) int64, token of each sorted position.
        blocks: (expert, start, stop) of each non-empty expert in the sorted order.
        bags_N: (N,) int64, sorted positions grouped by token.
        bag_offsets_T: (T,) int64, start of each token's positions in ``bags_N``.
    """

    order_N: Tensor
    token_ids_N: Tensor
    blocks: list[tuple[int, int, int]]
    bags_N: Tensor
    bag_offsets_T: Tensor


def sort_by_expert(routing: Routing) -> ExpertOrder:
    """Sort assignments by expert, stably, so that the result does not depend on the device."""
    expert_ids_N, num_experts = routing.expert_ids_N, routing.num_experts
    # Sorting 16-bit keys is three times faster than 64-bit ones on CPU.
    keys_N = expert_ids_N.to(torch.int16) if num_experts < 2**15 else expert_ids_N
    order_N = keys_N.argsort(stable=True)
    sorted_N = torch.empty_like(order_N)
    sorted_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    if routing.top_k is not None:
        bags_N = sorted_N
        bag_offsets_T = torch.arange(0, sorted_N.numel(), routing.top_k, device=order_N.device)
    else:
        bags_N = sorted_N[routing.token_ids_N.argsort(stable=True)]
        sizes_T = torch.bincount(routing.token_ids_N, minlength=routing.num_tokens)
        bag_offsets_T = sizes_T.cumsum(0) - sizes_T
    blocks, start = [], 0
    for expert, count in enumerate(torch.bincount(expert_ids_N, minlength=num_experts).tolist()):
        if count:
            blocks.append((expert, start, start + count))
        start += count
    return ExpertOrder(
        order_N=order_N,
        token_ids_N=routing.token_ids_N[order_N],
        blocks=blocks,
        bags_N=bags_N,
        bag_offsets_T=bag_offsets_T,
    )


def _sum_by_token(rows_ND: Tensor, order: ExpertOrder, weights_N: Tensor | None) -> Tensor:
    """Gather-sum of sorted rows into tokens: (N, D) -> (T, D), accumulated in fp32."""
    if weights_N is not None:
        weights_N = weights_N.to(rows_ND.dtype)
    return F.embedding_bag(order.bags_N, rows_ND, order.bag_offsets_T, mode="sum", per_sample_weights=weights_N)


def _activate_into(out_rF: Tensor, h_rH: Tensor, activation: str) -> None:
    if activation == "swiglu":
        width = out_rF.shape[1]
        torch.ops.aten.silu.out(h_rH[:, :width], out=out_rF)
        out_rF.mul_(h_rH[:, width:])
    else:
        torch.ops.aten.gelu.out(h_rH, out=out_rF)


def _activate_backward(
    dh_rH: Tensor, a_rF: Tensor, da_rF: Tensor, h_rH: Tensor, weights_r1: Tensor, tmp_rF: Tensor, activation: str
) -> Tensor:
    """Backward of the weighted activation of one expert's rows.

    In: ``da_rF`` = d(loss)/d(weight * a) without the weight, overwritten. Out: ``dh_rH``, and ``a_rF`` = weight * a.
    Returns d(loss)/d(weight) of each row, fp32.
    """
    if activation == "swiglu":
        width = a_rF.shape[1]
        gate_rF, up_rF = h_rH[:, :width], h_rH[:, width:]
        silu_rF = torch.ops.aten.silu.out(gate_rF, out=a_rF)
        dsilu_rF = torch.mul(da_rF, up_rF, out=tmp_rF)
        dweights_r = (silu_rF * dsilu_rF).sum(-1, dtype=torch.float32)
        torch.ops.aten.silu_backward.grad_input(dsilu_rF.mul_(weights_r1), gate_rF, grad_input=dh_rH[:, :width])
        weighted_rF = silu_rF.mul_(weights_r1)
        torch.mul(da_rF, weighted_rF, out=dh_rH[:, width:])
        weighted_rF.mul_(up_rF)
    else:
        torch.ops.aten.gelu.out(h_rH, out=a_rF)
        dweights_r = (a_rF * da_rF).sum(-1, dtype=torch.float32)
        torch.ops.aten.gelu_backward.grad_input(da_rF.mul_(weights_r1), h_rH, grad_input=dh_rH)
        a_rF.mul_(weights_r1)
    return dweights_r


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_N: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        order: ExpertOrder,
        act: str,
        recompute: bool,
    ) -> Tensor:
        num_rows, dim, width = order.order_N.numel(), x_TD.shape[1], w_down_EDF.shape[2]
        height = w_up_EHD.shape[1]
        h_NH = x_TD.new_empty(0 if recompute else num_rows, height)
        y_ND = _scratch.take("rows", x_TD, num_rows, dim)

        def run_expert(expert: int, start: int, stop: int) -> None:
            rows = stop - start
            x_rD, a_rF = _scratch.take("x", x_TD, rows, dim), _scratch.take("a", x_TD, rows, width)
            h_rH = _scratch.take("h", x_TD, rows, height) if recompute else h_NH[start:stop]
            torch.index_select(x_TD, 0, order.token_ids_N[start:stop], out=x_rD)
            torch.mm(x_rD, w_up_EHD[expert].T, out=h_rH)
            _activate_into(a_rF, h_rH, act)
            torch.mm(a_rF, w_down_EDF[expert].T, out=y_ND[start:stop])

        for_each_expert(order.blocks, x_TD.device, run_expert)
        # Bags list assignments token by token, so their weights need the same order as `bags_N`.
        sorted_weights_N = weights_N.detach()[order.order_N]
        ctx.save_for_backward(x_TD, h_NH, sorted_weights_N, w_up_EHD, w_down_EDF)
        ctx.order, ctx.act, ctx.recompute = order, act, recompute
        return _sum_by_token(y_ND, order, sorted_weights_N[order.bags_N])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, h_NH, weights_N, w_up_EHD, w_down_EDF = ctx.saved_tensors
        order: ExpertOrder = ctx.order
        needs_x, _, needs_up, needs_down = ctx.needs_input_grad[:4]
        num_rows, height = order.order_N.numel(), h_NH.shape[1]
        dim, width = x_TD.shape[1], w_down_EDF.shape[2]
        dy_TD = dy_TD.contiguous()
        dx_ND = _scratch.take("rows", x_TD, num_rows, dim)
        dweights_N = torch.empty(num_rows, device=x_TD.device, dtype=torch.float32)
        dw_up_EHD = torch.empty_like(w_up_EHD) if needs_up else None
        dw_down_EDF = torch.empty_like(w_down_EDF) if needs_down else None
        compute_weights_N1 = weights_N.to(x_TD.dtype)[:, None]

        def run_expert(expert: int, start: int, stop: int) -> None:
            rows, token_ids_r = stop - start, order.token_ids_N[start:stop]
            x_rD, dy_rD = _scratch.take("x", x_TD, rows, dim), _scratch.take("dy", x_TD, rows, dim)
            a_rF, da_rF, tmp_rF = (_scratch.take(name, x_TD, rows, width) for name in ("a", "da", "tmp"))
            dh_rH = _scratch.take("dh", x_TD, rows, height)
            torch.index_select(dy_TD, 0, token_ids_r, out=dy_rD)
            torch.mm(dy_rD, w_down_EDF[expert], out=da_rF)
            if needs_up or ctx.recompute:
                torch.index_select(x_TD, 0, token_ids_r, out=x_rD)
            if ctx.recompute:
                h_rH = torch.mm(x_rD, w_up_EHD[expert].T, out=_scratch.take("h", x_TD, rows, height))
            else:
                h_rH = h_NH[start:stop]
            dweights_N[start:stop] = _activate_backward(
                dh_rH, a_rF, da_rF, h_rH, compute_weights_N1[start:stop], tmp_rF, ctx.act
            )
            if dw_down_EDF is not None:
                torch.mm(dy_rD.T, a_rF, out=dw_down_EDF[expert])
            if dw_up_EHD is not None:
                torch.mm(dh_rH.T, x_rD, out=dw_up_EHD[expert])
            if needs_x:
                torch.mm(dh_rH, w_up_EHD[expert], out=dx_ND[start:stop])

        for_each_expert(order.blocks, x_TD.device, run_expert)
        _zero_idle_experts(order, dw_up_EHD, dw_down_EDF)
        dx_TD = _sum_by_token(dx_ND, order, None) if needs_x else None
        return (
            dx_TD,
            torch.empty_like(dweights_N).index_copy_(0, order.order_N, dweights_N),
            dw_up_EHD,
            dw_down_EDF,
            None,
            None,
            None,
        )


def _zero_idle_experts(order: ExpertOrder, *gradients: Tensor | None) -> None:
    """Experts without a row get zeros, not what the memory held before."""
    busy = {expert for expert, _, _ in order.blocks}
    for gradient in gradients:
        if gradient is not None:
            for expert in set(range(gradient.shape[0])) - busy:
                gradient[expert].zero_()


def expert_ffn(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """See `ops.expert_ffn`; gradients that are added to a buffer are first rounded to the dtype of x."""
    order = sort_by_expert(routing)
    weights = with_main_grads(w_up_EHD, w_down_EDF, options)
    # Under autocast the caller decided on a compute dtype; matmul(out=) does not cast by itself.
    weights_N = routing.weights_N.float()
    return _GroupedFFN.apply(x_TD, weights_N, weights.up_EHD, weights.down_EDF, order, activation, options.recompute)
