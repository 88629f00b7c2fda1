"""Which routed experts a gate chooses, what of the FFN then runs, and a linear gate for any grouping of neurons.

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.neurons import chunks, hidden
from moe.convert.carve.ridge import solve_ridge
from moe.convert.carve.types import Carving, LayerInputs, LinearGate, NeuronGate
from moe.convert.dense import DenseFFN

_RIDGE = 1e-3  # penalty of a linear gate, as a share of each input's mean square


def scores(gate: LinearGate | NeuronGate, x_TD: Tensor) -> Tensor:
    """(T, R) fp32, by which the best experts are chosen."""
    if isinstance(gate, LinearGate):
        return x_TD @ gate.weight_RD.T + gate.bias_R
    return ((x_TD @ gate.up_RD.T) * F.silu(x_TD @ gate.gate_RD.T)).abs()


def best(scores_TR: Tensor, top_k: int) -> Tensor:
    """(T, R) bool, True at the K largest of each row."""
    chosen_TR = torch.zeros_like(scores_TR, dtype=torch.bool)
    return chosen_TR.scatter_(1, scores_TR.topk(top_k, -1).indices, True)


def running_neurons(carving: Carving, x_TD: Tensor, top_k: int) -> Tensor:
    """(T, F) fp32, 1 where a neuron runs: that of a shared expert, or of one that the gate chooses."""
    chosen_TR = best(scores(carving.gate, x_TD), top_k)
    always_T1 = chosen_TR.new_ones(len(x_TD), 1)
    return torch.cat((chosen_TR, always_T1), 1).to(x_TD.dtype)[:, expert_of_neuron(carving)]


def expert_of_neuron(carving: Carving) -> Tensor:
    """(F,) int64 routed expert of each neuron, and R for the shared ones."""
    num_routed, per_expert = carving.routed_RM.shape
    expert_F = torch.full((carving.routed_RM.numel() + carving.shared_M.numel(),), num_routed)
    expert_F[carving.routed_RM.flatten()] = torch.arange(num_routed).repeat_interleave(per_expert)
    return expert_F


def carved_output(ffn: DenseFFN, carving: Carving, x_TD: Tensor, top_k: int) -> Tensor:
    """(T, D) what the carved FFN gives, computed densely, chunk by chunk."""
    down_DF = ffn.down_DF if carving.down_DF is None else carving.down_DF
    parts = []
    for chunk in chunks(len(x_TD)):
        kept_TF = hidden(ffn, x_TD[chunk]).mul_(running_neurons(carving, x_TD[chunk], top_k))
        parts.append(kept_TF @ down_DF.T)
    return torch.cat(parts)


def expert_energy(ffn: DenseFFN, routed_RM: Tensor, x_TD: Tensor) -> Tensor:
    """(T, R) sum of h^2 |wd|^2 over an expert's neurons: how much an expert matters to a token."""
    norms_F = ffn.down_DF.square().sum(0)
    return hidden(ffn, x_TD).square_().mul_(norms_F)[:, routed_RM.flatten()].view(len(x_TD), *routed_RM.shape).sum(-1)


def fit_linear_gate(ffn: DenseFFN, inputs: LayerInputs, routed_RM: Tensor) -> LinearGate:
    """Ridge regression of the square root of each expert's energy on the FFN's input, so that the larger prediction wins."""
    x_TD, weights_T = inputs.x_TD, inputs.weights_T / inputs.weights_T.sum()
    mean_D = weights_T @ x_TD
    num_routed, dim = len(routed_RM), x_TD.shape[1]
    gram_DD, cross_DR, mean_R = x_TD.new_zeros(dim, dim), x_TD.new_zeros(dim, num_routed), x_TD.new_zeros(num_routed)
    for chunk in chunks(len(x_TD)):
        centred_TD = x_TD[chunk] - mean_D
        weighted_TD = centred_TD * weights_T[chunk, None]
        target_TR = expert_energy(ffn, routed_RM, x_TD[chunk]).sqrt_()
        gram_DD += weighted_TD.T @ centred_TD
        cross_DR += weighted_TD.T @ target_TR
        mean_R += weights_T[chunk] @ target_TR
    weight_RD = solve_ridge(gram_DD, cross_DR, _RIDGE).T.contiguous()
    return LinearGate(weight_RD=weight_RD, bias_R=mean_R - weight_RD @ mean_D)
