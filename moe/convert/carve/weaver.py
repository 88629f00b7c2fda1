"""ExpertWeaver: groups of neurons whose gates open on the same texts, and a linear gate of their mean rows (arXiv 2602.15521).

A neuron's profile is its mean gate activation silu(x Wg) on each calibration text. The neurons with the largest mean |profile|
are shared; balanced k-means on the profiles groups the rest; an expert's gate row is the mean of its members' rows of Wg. Two
differences: a text is a calibration window here, where the paper has samples of 42 tasks, and every layer shares the same
number of experts, where the paper varies it by layer, which stock architectures have no field for.

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert, P calibration windows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.neurons import chunks
from moe.convert.carve.types import CarveShape, Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN
from moe.routers.assignment import balanced_assignment

_MAX_ROUNDS = 20


@torch.no_grad()
def carve(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """ExpertWeaver's experts with a uniform shared part, and its gate; k-means starts from drawn neurons.

    Raises:
        ValueError: the FFN has no gate projection.
    """
    if ffn.gate_FD is None:
        raise ValueError("--method weaver groups rows of the gate projection, which this model's FFNs do not have")
    per_expert = shape.check(ffn.width)
    profiles_FP = gate_profiles(ffn.gate_FD, inputs)
    order_F = profiles_FP.abs().mean(1).argsort(descending=True, stable=True)
    shared_M, rest_M = order_F[: shape.num_shared * per_expert], order_F[shape.num_shared * per_expert :]
    expert_M = balanced_kmeans(profiles_FP[rest_M], shape.num_routed, generator)
    routed_RM = rest_M[expert_M.argsort(stable=True)].view(shape.num_routed, per_expert)
    gate = LinearGate(weight_RD=ffn.gate_FD[routed_RM].mean(1), bias_R=torch.zeros(shape.num_routed))
    return Carving(shared_M=shared_M, routed_RM=routed_RM, gate=gate)


def gate_profiles(gate_FD: Tensor, inputs: LayerInputs) -> Tensor:
    """(F, P) mean of silu(x Wg) over the tokens of each calibration window."""
    num_windows = int(inputs.sequence_T.max()) + 1
    sums_PF = gate_FD.new_zeros(num_windows, len(gate_FD))
    for chunk in chunks(len(inputs.x_TD)):
        sums_PF.index_add_(0, inputs.sequence_T[chunk], F.silu(inputs.x_TD[chunk] @ gate_FD.T))
    return (sums_PF / torch.bincount(inputs.sequence_T, minlength=num_windows)[:, None]).T


def balanced_kmeans(points_NP: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """(N,) int64 group of each point, all of the same size, by k-means whose assignments are optimal under that constraint.

    Args:
        points_NP: N points, a multiple of ``num_groups``.
        num_groups: how many groups.
        generator: draws the points that the first centres are, each far from those before it (k-means++).
    """
    centres_RP = points_NP[_spread_points(points_NP, num_groups, generator)]
    group_N = torch.full((len(points_NP),), -1)
    for _ in range(_MAX_ROUNDS):
        before_N = group_N
        group_N = balanced_assignment(-torch.cdist(points_NP, centres_RP).square())
        if torch.equal(group_N, before_N):
            break
        centres_RP = points_NP[group_N.argsort(stable=True)].view(num_groups, -1, points_NP.shape[1]).mean(1)
    return group_N


def _spread_points(points_NP: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 different points, drawn with the square of the distance to the nearest before (k-means++)."""
    chosen = [int(torch.randint(len(points_NP), (1,), generator=generator))]
    nearest_N = (points_NP - points_NP[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        odds_N = nearest_N.clone()
        odds_N[chosen] = 0
        if not bool((odds_N > 0).any()):  # all others lie on chosen points
            odds_N.fill_(1)[chosen] = 0
        chosen.append(int(torch.multinomial(odds_N, 1, generator=generator)))
        nearest_N = nearest_N.minimum((points_NP - points_NP[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)
