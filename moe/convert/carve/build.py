"""A carving as the weights of an MoE layer, and the router that runs it.

The carved layer adds up the experts that its gate chooses, each with weight 1. Stock architectures have no such gate, but
GLM4-MoE's comes as near as one likes: scores sigmoid(z), a bias b that is added for the choice alone, and weights
K sigmoid(z_k) / sum over the chosen of sigmoid(z). With the gate's scores s = xW + c scaled by a small e, z = e xW and
b = e c / 4, the choice is that of s, since sigmoid(z) = 1/2 + z/4 - O(z^3), and a weight is 1 + O(e s).

Legend: D model, F neurons, R routed experts, m neurons of an expert, H = 2m (gate rows, then up rows) or m, S shared neurons.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.convert.carve.types import CarveShape, Carving, LinearGate, NeuronGate
from moe.convert.dense import DenseFFN
from moe.models.moe_weights import MoEWeights

# Scores have a mean square of 1 before they are scaled by this; see `docs/carving.md` for what was measured.
SCALE = 2.0**-10


def unit_weight_router(top_k: int) -> dict[str, Any]:
    """Options of a linear gate whose chosen experts all have weight 1, nearly; with one expert per token exactly."""
    options: dict[str, Any] = {
        "name": "topk",
        "top_k": top_k,
        "score": "sigmoid",
        "renormalize": True,
        "selection_bias": True,
        "route_scale": float(top_k),
    }
    return options | ({"frozen": True} if top_k == 1 else {})


def neuron_router(top_k: int) -> dict[str, Any]:
    """Options of CMoE's gate."""
    return {"name": "cmoe", "top_k": top_k}


ROUTER_OPTIONS: dict[type, Callable[[int], dict[str, Any]]] = {
    LinearGate: unit_weight_router,
    NeuronGate: neuron_router,
}


def moe_spec(shape: CarveShape, per_expert: int, activation: str, gate: type) -> dict[str, Any]:
    """`MoESpec` of the carved model, as plain data.

    Args:
        shape: how many experts.
        per_expert: m.
        activation: of the FFN, "swiglu" or "gelu".
        gate: the class of all layers' gates.
    """
    return {
        "num_experts": shape.num_routed,
        "expert_hidden": per_expert,
        "num_shared_experts": shape.num_shared,
        "activation": activation,
        "router": ROUTER_OPTIONS[gate](shape.top_k),
        "balance": {"aux_coef": 0.0},  # experts are as large as the text makes them: a balance loss would undo the gate
    }


def build_layer(ffn: DenseFFN, carving: Carving, top_k: int, x_TD: Tensor, dtype: torch.dtype) -> MoEWeights:
    """The layer's weights.

    Args:
        ffn: the dense FFN.
        carving: of it.
        top_k: K.
        x_TD: calibration inputs, which set the scale of a linear gate.
        dtype: of the result, but for the selection bias, which is fp32.
    """
    down_DF = (ffn.down_DF if carving.down_DF is None else carving.down_DF).to(dtype)
    routed_N, num_routed = carving.routed_RM.flatten(), len(carving.routed_RM)
    has_shared = carving.shared_M.numel() > 0
    return MoEWeights(
        router={
            name: tensor if name == "bias_E" else tensor.to(dtype)
            for name, tensor in _router_weights(carving.gate, top_k, x_TD).items()
        },
        gate_up_EHD=_rows(ffn, routed_N, dtype, num_routed).contiguous(),
        down_EDF=down_DF[:, routed_N].view(len(down_DF), num_routed, -1).transpose(0, 1).contiguous(),
        shared_gate_up_HD=_rows(ffn, carving.shared_M, dtype, 1)[0] if has_shared else None,
        shared_down_DF=down_DF[:, carving.shared_M].contiguous() if has_shared else None,
    )


def _rows(ffn: DenseFFN, neurons_N: Tensor, dtype: torch.dtype, num_experts: int) -> Tensor:
    """(experts, H, D) rows of the projections of experts whose neurons follow each other."""
    parts = [rows for rows in (ffn.gate_FD, ffn.up_FD) if rows is not None]
    return torch.cat([rows[neurons_N].to(dtype).unflatten(0, (num_experts, -1)) for rows in parts], 1)


def _router_weights(gate: LinearGate | NeuronGate, top_k: int, x_TD: Tensor) -> dict[str, Tensor]:
    if isinstance(gate, NeuronGate):
        zeros_R = torch.zeros(len(gate.up_RD))
        return {"weight": gate.gate_RD, "up_weight": gate.up_RD, "scale": zeros_R, "bias_E": zeros_R.clone()}
    if top_k == len(gate.bias_R):  # there is no choice, and equal scores make all weights exactly 1
        return {"weight": torch.zeros_like(gate.weight_RD), "bias_E": torch.zeros_like(gate.bias_R)}
    scaled = rescale(gate, x_TD, SCALE)
    return {"weight": scaled.weight_RD, "bias_E": scaled.bias_R / 4}


def rescale(gate: LinearGate, x_TD: Tensor, scale: float) -> LinearGate:
    """A gate with the same choices, whose x W^T has mean 0 over the experts and mean square ``scale``^2 over ``x_TD``."""
    weight_RD = gate.weight_RD - gate.weight_RD.mean(0)
    bias_R = gate.bias_R - gate.bias_R.mean()
    size = (x_TD @ weight_RD.T).square().mean().sqrt()
    size = size if size > 0 else bias_R.abs().max()  # the bias alone chooses
    factor = scale / size if size > 0 else 1.0
    return dataclasses.replace(gate, weight_RD=weight_RD * factor, bias_R=bias_R * factor)
