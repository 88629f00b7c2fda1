"""The only door to kernels: each op picks the implementation for its device and hides which one it was.

``MOE_KERNELS`` forces one for the whole process: ``reference`` (double loop, the oracle) or ``grouped`` (sorted rows, plain
torch, any device). Unset, the fastest one that can run is taken.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, N assignments.
"""

import os
from collections.abc import Callable

from torch import Tensor

from moe.kernels import grouped, reference
from moe.types import Routing

_EXPERT_FFN: dict[str, Callable[[Tensor, Routing, Tensor, Tensor, str], Tensor]] = {
    "reference": reference.expert_ffn,
    "grouped": grouped.expert_ffn,
}


def chosen() -> str:
    """Name of the implementation that ops use in this process."""
    name = os.environ.get("MOE_KERNELS", "grouped")
    if name not in _EXPERT_FFN:
        raise ValueError(f"MOE_KERNELS={name!r} is unknown; use one of {sorted(_EXPERT_FFN)}, or unset it")
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
    return _EXPERT_FFN[chosen()](x_TD, routing, w_up_EHD, w_down_EDF, activation)
