"""The only door to kernels: each op picks the implementation for its device and hides which one it was.

``MOE_KERNELS`` forces one for the whole process: ``reference`` (one expert at a time by autograd, the oracle), ``grouped``
(sorted rows, plain torch, any device) or ``triton`` (fused kernels for NVIDIA GPUs). A forced one that cannot run raises. Unset,
it is ``triton`` for CUDA tensors where that can run, else ``grouped``; the first time a CUDA tensor goes without, a warning says
why. An op that has no grouped form takes its reference there.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, K top-k, N assignments.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.kernels import grouped, quantized, quantized_cpu, reference
from moe.kernels.quantized import Multiplier
from moe.types import DEFAULT_FFN, FFNOptions, Routing, TopKChoices, TopKRule

try:
    from moe.kernels import triton_ops, triton_quantized_ops, triton_router_ops
except ImportError as error:  # Triton is made for Linux, and the layer works without it
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

_ExpertFFN = Callable[[Tensor, Routing, Tensor, Tensor, str, FFNOptions], Tensor]
_EXPERT_FFN: dict[str, _ExpertFFN] = {
    "reference": reference.expert_ffn,
    "grouped": grouped.expert_ffn,
}
_EXPERT_FFN_FP8: dict[str, _ExpertFFN] = {
    "reference": quantized.expert_ffn_fp8,
    "grouped": quantized.expert_ffn_fp8,
}
_ROUTE_TOPK: dict[str, Callable[[Tensor, TopKRule, Tensor | None, Tensor | None], TopKChoices]] = {
    "reference": reference.route_topk,
    "grouped": reference.route_topk,
}
_EXPERT_FFN_QUANTIZED: dict[str, Callable[[Tensor, Routing, Any, Any, str], Tensor]] = {
    "reference": quantized.expert_ffn_quantized,
    "grouped": quantized_cpu.expert_ffn_quantized,
}
_LINEAR_QUANTIZED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reference": quantized.linear_quantized,
    "grouped": quantized.linear_quantized,
}
if _IMPORT_ERROR is None:
    _LINEAR_QUANTIZED["triton"] = triton_quantized_ops.linear_quantized
    _EXPERT_FFN_QUANTIZED["triton"] = triton_quantized_ops.expert_ffn_quantized
    _EXPERT_FFN["triton"] = triton_ops.expert_ffn
    _EXPERT_FFN_FP8["triton"] = triton_quantized_ops.expert_ffn_fp8
    _ROUTE_TOPK["triton"] = triton_router_ops.route_topk
NAMES = ("grouped", "reference", "triton")


@torch.compiler.assume_constant_result
def _triton_problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run; None where they can."""
    if _IMPORT_ERROR is not None:
        return f"triton cannot be imported ({_IMPORT_ERROR})"
    return triton_ops.problem(device_type, dtype)


@torch.compiler.assume_constant_result
def _scheme_problem(device_type: str, scheme: str | None) -> str | None:
    """Why the Triton kernels, which can run, cannot with such weights; None where they can."""
    return triton_quantized_ops.problem(device_type, scheme) if scheme is not None else None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"fused kernels are not used, plain torch is: {problem}", stacklevel=3)


def chosen(device_type: str = "cpu", dtype: torch.dtype = torch.float32, scheme: str | None = None) -> str:
    """Name of the implementation that ops use for such tensors in this process; ``scheme`` is that of quantised weights.

    Raises:
        ValueError: ``MOE_KERNELS`` is unknown, or names one that cannot run on them.
    """
    name = os.environ.get("MOE_KERNELS")
    if name is None:
        if device_type != "cuda":
            return "grouped"
        if problem := _triton_problem(device_type, dtype) or _scheme_problem(device_type, scheme):
            _warn_once(problem)
            return "grouped"
        return "triton"
    if name not in NAMES:
        raise ValueError(f"MOE_KERNELS={name!r} is unknown; use one of {list(NAMES)}, or unset it")
    if name == "triton" and (problem := _triton_problem(device_type, dtype) or _scheme_problem(device_type, scheme)):
        raise ValueError(f"MOE_KERNELS='triton' cannot run: {problem}; unset it to let the device decide")
    return name


def expert_ffn(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """Weighted sum of each token's experts: y_t = sum over (t, e, w) in the routing of w * down_e(act(up_e(x_t))).

    Args:
        x_TD: (T, D) in any floating dtype; the matmuls run in it.
        routing: assignments; its expert ids index the weights given here. Only ids, weights and ``top_k`` are read.
        w_up_EHD: (E, H, D) in the dtype of x; for SwiGLU the gate's F rows first, then the up-projection's.
        w_down_EDF: (E, D, F).
        activation: "swiglu" or "gelu".
        options: memory, precision, and where gradients of the weights go.

    Returns:
        (T, D) in the dtype of x. Gradients flow to x, ``routing.weights_N`` (fp32) and both weights.
    """
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation={activation!r} is unknown; use 'swiglu' or 'gelu'")
    name = chosen(x_TD.device.type, x_TD.dtype, "fp8" if options.fp8 else None)
    table = _EXPERT_FFN_FP8 if options.fp8 else _EXPERT_FFN
    return table[name](x_TD, routing, w_up_EHD, w_down_EDF, activation, options)


def expert_ffn_quantized(x_TD: Tensor, routing: Routing, up: Multiplier, down: Multiplier, activation: str) -> Tensor:
    """`expert_ffn` on quantised weights, for inference: asking for a gradient of the result is an error.

    Args:
        x_TD: (T, D) in any floating dtype. Integer weights are dequantised to it; for fp8 the rows are rounded to fp8 as well,
            with one scale each.
        routing: as for `expert_ffn`.
        up: (E, H, D), in the order of rows of `expert_ffn`. A `QuantizedWeight` runs on any device; what
            `quantized_cpu.for_cpu` makes of one, on CPU without ``MOE_KERNELS=triton``.
        down: (E, D, F), of the same scheme.
        activation: "swiglu" or "gelu".

    Returns:
        (T, D) in the dtype of x.
    """
    quantized.check_pair(x_TD, up, down, activation)
    ffn = _EXPERT_FFN_QUANTIZED[chosen(x_TD.device.type, x_TD.dtype, up.scheme)]
    return quantized.inference_only(lambda: ffn(x_TD, routing, up, down, activation), x_TD, routing.weights_N)


def linear_quantized(x_nQ: Tensor, weight: Multiplier) -> Tensor:
    """Rows times a quantised matrix, for inference.

    Args:
        x_nQ: (n, Q) in any floating dtype, treated as in `expert_ffn_quantized`.
        weight: (1, P, Q).

    Returns:
        (n, P) in the dtype of x.
    """
    num_matrices, _, num_columns = weight.shape
    if num_matrices != 1 or x_nQ.shape[1] != num_columns:
        raise ValueError(
            f"weight {weight.shape} does not fit rows of {x_nQ.shape[1]}; it must be (1, P, {x_nQ.shape[1]})"
        )
    linear = _LINEAR_QUANTIZED[chosen(x_nQ.device.type, x_nQ.dtype, weight.scheme)]
    return quantized.inference_only(lambda: linear(x_nQ, weight), x_nQ)


def route_topk(
    logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None = None, keep_T: Tensor | None = None
) -> TopKChoices:
    """Choose K experts per token, weigh them, count them, and sum what losses and metrics need.

    The choice is by logits, or by score plus bias where there is one; of equal experts the first is taken (`torch.topk`
    promises no order). With groups, a group counts as much as its best expert, with a bias as its two best together. An
    expert of a dropped group is never chosen; NaN counts as the largest, so that ids are always valid.

    Args:
        logits_TE: (T, E) in any floating dtype; the maths is in fp32.
        rule: how scores become weights; ``top_k`` at most the number of experts in ``top_k_groups`` groups.
        bias_E: (E,), changes who is chosen and never the weight.
        keep_T: (T,) bool, which tokens the statistics are about; ``None`` for all.

    Returns:
        Choices and sums. Gradients of weights, probability and z sums flow to the logits.
    """
    return _ROUTE_TOPK[chosen(logits_TE.device.type, logits_TE.dtype)](logits_TE, rule, bias_E, keep_T)
