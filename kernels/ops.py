"""The only door to kernels: each op picks the implementation for its device and hides which one it was.

``MOE_KERNELS`` forces one for the whole process: ``reference`` (one expert at a time by autograd, the oracle), ``grouped``
(sorted rows, plain torch, any device) or ``triton`` (fused kernels for NVIDIA GPUs). A forced one that cannot run raises. Unset,
it is ``triton`` for CUDA tensors where that can run, else ``grouped``; the first time a CUDA tensor goes without, a warning says
why.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments.
"""

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from moe.kernels import grouped, reference
from moe.types import Routing

try:
    from moe.kernels import triton_ops
except ImportError as error:  # Triton is made for Linux, and the layer works without it
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

_EXPERT_FFN: dict[str, Callable[[Tensor, Routing, Tensor, Tensor, str], Tensor]] = {
    "reference": reference.expert_ffn,
    "grouped": grouped.expert_ffn,
}
if _IMPORT_ERROR is None:
    _EXPERT_FFN["triton"] = triton_ops.expert_ffn
NAMES = ("grouped", "reference", "triton")


@torch.compiler.assume_constant_result
def _triton_problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run; None where they can."""
    if _IMPORT_ERROR is not None:
        return f"triton cannot be imported ({_IMPORT_ERROR})"
    return triton_ops.problem(device_type, dtype)


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"fused kernels are not used, plain torch is: {problem}", stacklevel=3)


def chosen(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the implementation that ops use for such tensors in this process.

    Raises:
        ValueError: ``MOE_KERNELS`` is unknown, or names one that cannot run on them.
    """
    name = os.environ.get("MOE_KERNELS")
    if name is None:
        if device_type != "cuda":
            return "grouped"
        if problem := _triton_problem(device_type, dtype):
            _warn_once(problem)
            return "grouped"
        return "triton"
    if name not in NAMES:
        raise ValueError(f"MOE_KERNELS={name!r} is unknown; use one of {list(NAMES)}, or unset it")
    if name == "triton" and (problem := _triton_problem(device_type, dtype)):
        raise ValueError(f"MOE_KERNELS='triton' cannot run: {problem}; unset it to let the device decide")
    return name


def expert_ffn(x_TD: Tensor, routing: Routing, w_up_EHD: Tensor, w_down_EDF: Tensor, activation: str) -> Tensor:
    """Weighted sum of each token's experts: y_t = sum over (t, e, w) in the routing of w * down_e(act(up_e(x_t))).

    Args:
        x_TD: (T, D) in any floating dtype; the matmuls run in it.
        routing: assignments; its expert ids index the weights given here. Only ids, weights and ``top_k`` are read.
        w_up_EHD: (E, H, D) in the dtype of x; for SwiGLU the gate's F rows first, then the up-projection's.
        w_down_EDF: (E, D, F).
        activation: "swiglu" or "gelu".

    Returns:
        (T, D) in the dtype of x. Gradients flow to x, ``routing.weights_N`` (fp32) and both weights.
    """
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation={activation!r} is unknown; use 'swiglu' or 'gelu'")
    return _EXPERT_FFN[chosen(x_TD.device.type, x_TD.dtype)](x_TD, routing, w_up_EHD, w_down_EDF, activation)
