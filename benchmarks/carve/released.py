"""The grouping of CMoE's released code (github.com/JarvisPei/CMoE), with its cost: what our version is measured against.

Written anew after that code: tokens are marked one by one in a T x F matrix, distances are taken between whole columns, and the
assignment is solved on an n x n matrix in which each expert's column stands m times. SciPy's Jonker-Volgenant solver takes the
place of the package lap's.

Legend: T tokens, F neurons, R routed experts, m neurons of an expert, n = R * m.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.types import CarveShape, Carving, LayerInputs, NeuronGate
from moe.convert.dense import DenseFFN

NUM_MARKS = 10


def carve(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """Experts and gate as the released code makes them."""
    assert ffn.gate_FD is not None
    gate_FD, up_FD = F.normalize(ffn.gate_FD), F.normalize(ffn.up_FD)
    unit_TD = F.normalize(inputs.x_TD)
    h_TF = F.silu(unit_TD @ gate_FD.T) * (unit_TD @ up_FD.T)
    marks_TF = torch.zeros_like(h_TF)
    for token in range(len(h_TF)):
        marks_TF[token, h_TF[token].abs().topk(NUM_MARKS).indices] = 1.0
    rates_F = marks_TF.sum(0) / len(marks_TF)
    per_expert = ffn.width // shape.num_experts
    order_F = rates_F.argsort(descending=True, stable=True)
    shared_M, rest_n = order_F[: shape.num_shared * per_expert], order_F[shape.num_shared * per_expert :]
    columns_nT = marks_TF[:, rest_n].T
    centroids_RT = columns_nT[: shape.num_routed].clone()
    expert_n = _assign(columns_nT, centroids_RT, per_expert)
    members = []
    representatives = []
    for expert in range(shape.num_routed):
        ids_m = (expert_n == expert).nonzero()[:, 0]
        centre_1T = columns_nT[ids_m].mean(0, keepdim=True)
        nearest = torch.cdist(centre_1T, columns_nT[ids_m], p=1)[0].argmin()
        representatives.append(rest_n[ids_m[nearest]])
        members.append(rest_n[ids_m])
    chosen_R = torch.stack(representatives)
    gate = NeuronGate(gate_RD=gate_FD[chosen_R], up_RD=up_FD[chosen_R])
    return Carving(shared_M=shared_M, routed_RM=torch.stack(members), gate=gate)


def _assign(columns_nT: Tensor, centroids_RT: Tensor, per_expert: int) -> Tensor:
    """(n,) int64 expert of each neuron."""
    distances_nR = torch.cdist(columns_nT, centroids_RT, p=1).numpy()
    repeated_nn = np.zeros((len(distances_nR), len(distances_nR)))
    for expert in range(len(centroids_RT)):
        repeated_nn[:, expert * per_expert : (expert + 1) * per_expert] = distances_nR[:, expert : expert + 1]
    _, columns_n = linear_sum_assignment(repeated_nn)
    return torch.from_numpy(columns_n) // per_expert
