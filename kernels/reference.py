"""Plain-torch ground truth of every op in `ops.py`: slow, differentiable by autograd, obviously right.

Legend: T tokens, D model, F expert FFN, E experts, N assignments, S slots.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.types import Routing


def activate(h_NH: Tensor, activation: str) -> Tensor:
    """Activation of the pre-activation ``h_NH``: (N, 2F) -> (N, F) for "swiglu" (gate first, then up), (N, F) for "gelu".

    SwiGLU is arXiv 2002.05202 eq. 6 without biases; GELU is the exact (erf) one.
    """
    if activation == "swiglu":
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        return F.silu(gate_NF) * up_NF
    if activation == "gelu":
        return F.gelu(h_NH)
    raise ValueError(f"activation={activation!r} is unknown; use 'swiglu' or 'gelu'")


def expert_ffn(x_TD: Tensor, routing: Routing, w_up_EHD: Tensor, w_down_EDF: Tensor, activation: str) -> Tensor:
    """Sum over assignments of weight * expert(token), one assignment's expert at a time; see `ops.expert_ffn`."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in range(w_up_EHD.shape[0]):
        picked_n = (routing.expert_ids_N == expert).nonzero().squeeze(-1)
        token_ids_n = routing.token_ids_N[picked_n]
        a_nF = activate(x_TD[token_ids_n] @ w_up_EHD[expert].T, activation)
        out_nD = (a_nF @ w_down_EDF[expert].T).to(y_TD.dtype) * routing.weights_N[picked_n, None].to(y_TD.dtype)
        y_TD = y_TD.index_add(0, token_ids_n, out_nD)
    return y_TD.to(x_TD.dtype)
