"""What is compared: functions of the same inputs, (x, experts, weights, two stacked matrices) -> y.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, K top-k, N = T * K.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels import ops
from moe.kernels.reference import activate
from moe.routers.assemble import routing_of_choices


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Leaves and choices of one call.

    Attributes:
        x_TD, weights_TK (fp32), w_up_EHD, w_down_EDF: with gradients.
        experts_TK: (T, K) int64.
        dy_TD: the gradient that comes back.
        activation: "swiglu" or "gelu".
    """

    x_TD: Tensor
    weights_TK: Tensor
    w_up_EHD: Tensor
    w_down_EDF: Tensor
    experts_TK: Tensor
    dy_TD: Tensor
    activation: str

    @property
    def leaves(self) -> list[Tensor]:
        """In the order of gradients."""
        return [self.x_TD, self.weights_TK, self.w_up_EHD, self.w_down_EDF]


def ours(inputs: Inputs) -> Tensor:
    """`ops.expert_ffn`, whichever implementation it picks for the device."""
    routing = routing_of_choices(inputs.experts_TK, inputs.weights_TK, inputs.w_up_EHD.shape[0])
    return ops.expert_ffn(inputs.x_TD, routing, inputs.w_up_EHD, inputs.w_down_EDF, inputs.activation)


def torch_grouped_mm(inputs: Inputs) -> Tensor:
    """`torch._grouped_mm` written plainly: gather, two grouped products, weight, scatter-add."""
    top_k = inputs.experts_TK.shape[1]
    experts_N = inputs.experts_TK.reshape(-1)
    order_N = experts_N.argsort(stable=True)
    tokens_N = order_N // top_k
    counts_E = torch.zeros(inputs.w_up_EHD.shape[0], dtype=torch.int64, device=experts_N.device)
    ends_E = counts_E.scatter_add_(0, experts_N, torch.ones_like(experts_N)).cumsum(0).to(torch.int32)
    h_NH = torch._grouped_mm(inputs.x_TD[tokens_N], inputs.w_up_EHD.transpose(1, 2), offs=ends_E)
    y_ND = torch._grouped_mm(activate(h_NH, inputs.activation), inputs.w_down_EDF.transpose(1, 2), offs=ends_E)
    weighted_ND = y_ND * inputs.weights_TK.reshape(-1)[order_N, None].to(y_ND.dtype)
    return torch.zeros_like(inputs.x_TD).index_add(0, tokens_N, weighted_ND)


@functools.cache
def _qwen3_experts(num_experts: int, dim: int, hidden: int) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(hidden_size=dim, num_experts=num_experts, moe_intermediate_size=hidden)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):  # the weights come with each call
        return Qwen3MoeSparseMoeBlock(config).experts


def transformers_grouped_mm(inputs: Inputs) -> Tensor:
    """transformers' own experts with their fastest implementation for training."""
    num_experts, height, dim = inputs.w_up_EHD.shape
    experts = _qwen3_experts(num_experts, dim, height // 2)
    weights = {"gate_up_proj": inputs.w_up_EHD, "down_proj": inputs.w_down_EDF}
    call = (inputs.x_TD, inputs.experts_TK, inputs.weights_TK.to(inputs.x_TD.dtype))
    return torch.func.functional_call(experts, weights, call)


def liger(inputs: Inputs) -> Tensor:
    """Liger-Kernel's fused Triton MoE (SwiGLU only), of its wheel; only where that is installed."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weights_TK = inputs.weights_TK.to(inputs.x_TD.dtype)
    experts_TK = inputs.experts_TK.to(torch.int32)
    return LigerFusedMoEFunction.apply(inputs.x_TD, inputs.w_up_EHD, inputs.w_down_EDF, experts_TK, weights_TK)


def scattermoe(inputs: Inputs) -> Tensor:
    """ScatterMoE's two scatter-GEMMs (arXiv 2403.08245) with the activation between; only where it is installed."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    num_experts, top_k = inputs.w_up_EHD.shape[0], inputs.experts_TK.shape[1]
    sorted_experts_N, sorted_slots_N, ends_E = flatten_sort_count(inputs.experts_TK, num_experts)
    order = {"sorted_expert_idxs": sorted_experts_N, "sorted_scattered_idxs": sorted_slots_N, "expert_offsets": ends_E}
    h_NH = parallel_linear(inputs.x_TD, inputs.w_up_EHD.transpose(1, 2), top_k, **order, grouped_out=True)
    gates_TK = inputs.weights_TK.to(h_NH.dtype)
    a_NF = activate(h_NH, inputs.activation)
    return parallel_linear(a_NF, inputs.w_down_EDF.transpose(1, 2), 1, **order, grouped_in=True, gates=gates_TK)


def dense(inputs: Inputs) -> Tensor:
    """One FFN of the same FLOPs (width K * F), cuBLAS: the ceiling. Its result is another one."""
    up_HD, down_DF = dense_weights(inputs)
    return F.linear(activate(F.linear(inputs.x_TD, up_HD), inputs.activation), down_DF)


def dense_weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The first K experts' matrices as one wide FFN's; views, so that gradients flow to the leaves."""
    top_k, (_, height, dim) = inputs.experts_TK.shape[1], inputs.w_up_EHD.shape
    return inputs.w_up_EHD[:top_k].reshape(top_k * height, dim), inputs.w_down_EDF[:top_k].reshape(dim, -1)


_OPTIONAL = {"liger": ("liger_kernel", liger), "scattermoe": ("scattermoe", scattermoe)}
SWIGLU_ONLY = ("transformers grouped_mm", "liger")
OURS, DENSE = "moe", "dense of the same FLOPs"
IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: ours,
    "transformers grouped_mm": transformers_grouped_mm,
    "torch grouped_mm": torch_grouped_mm,
    **{name: run for name, (package, run) in _OPTIONAL.items() if find_spec(package)},
    DENSE: dense,
}
