"""CMoE: groups of neurons that fire for the same tokens, found without training (Pei et al., arXiv 2502.04416).

On every token the K_a neurons with the largest |h| are marked. Those marked most often are the shared experts. The most marked
of the rest seed the routed experts; a balanced assignment at the least Hamming distance between marks fills them. The neuron
nearest to an expert's mean marks represents it: its |h| is the expert's score, so the gate needs no fit.

As in the released code: h is computed from inputs and rows of Wg and Wu of norm 1, the gate takes absolute values, and the
assignment is done once. The code solves it on a matrix with m copies of each expert's column; experts of equal columns are one
sink here that takes m neurons, which gives the same optimum (`moe.routers.assignment`), and marks are kept as lists.

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert, C columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.neurons import chunks, hidden
from moe.convert.carve.types import CarveShape, Carving, LayerInputs, NeuronGate
from moe.convert.dense import DenseFFN
from moe.routers.assignment import balanced_assignment

NUM_MARKS = 10  # K_a


@torch.no_grad()
def carve(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """CMoE's experts and gate; nothing is drawn from the generator.

    Raises:
        ValueError: the FFN has no gate projection.
    """
    if ffn.gate_FD is None:
        raise ValueError("--method cmoe scores experts by their gate projection, which this model's FFNs do not have")
    per_expert = shape.check(ffn.width)
    unit = DenseFFN(gate_FD=F.normalize(ffn.gate_FD), up_FD=F.normalize(ffn.up_FD), down_DF=ffn.down_DF)
    marks_TA = mark(unit, inputs.x_TD)
    rates_F = torch.bincount(marks_TA.flatten(), minlength=ffn.width)
    order_F = rates_F.argsort(descending=True, stable=True)
    shared_M, rest_M = order_F[: shape.num_shared * per_expert], order_F[shape.num_shared * per_expert :]
    seeds_R = rest_M[: shape.num_routed]
    together_FR = co_marks(marks_TA, F.one_hot(seeds_R, ffn.width).T.float())
    distances_MR = rates_F[rest_M, None] + rates_F[seeds_R] - 2 * together_FR[rest_M]
    expert_M = balanced_assignment(-distances_MR)
    routed_RM = rest_M[expert_M.argsort(stable=True)].view(shape.num_routed, per_expert)
    representatives_R = _representatives(marks_TA, routed_RM, ffn.width)
    assert unit.gate_FD is not None
    gate = NeuronGate(gate_RD=unit.gate_FD[representatives_R], up_RD=unit.up_FD[representatives_R])
    return Carving(shared_M=shared_M, routed_RM=routed_RM, gate=gate)


def mark(ffn: DenseFFN, x_TD: Tensor, num_marks: int = NUM_MARKS) -> Tensor:
    """(T, K_a) int64 neurons with the largest |h| of each token, whose norm does not count."""
    found = [
        hidden(ffn, F.normalize(x_TD[chunk])).abs_().topk(num_marks, sorted=False).indices
        for chunk in chunks(len(x_TD))
    ]
    return torch.cat(found)


def co_marks(marks_TA: Tensor, columns_FC: Tensor) -> Tensor:
    """(F, C) A^T A C, where A is the T x F matrix with 1 at the marks and C weighs its columns; A is never made whole."""
    width, num_columns = columns_FC.shape
    total_FC = columns_FC.new_zeros(width, num_columns)
    for chunk in chunks(len(marks_TA)):
        marks_tA = marks_TA[chunk]
        per_token_tC = columns_FC[marks_tA].sum(1)
        spread_nC = per_token_tC.repeat_interleave(marks_tA.shape[1], 0)
        total_FC.index_add_(0, marks_tA.flatten(), spread_nC)
    return total_FC


def _representatives(marks_TA: Tensor, routed_RM: Tensor, width: int) -> Tensor:
    """(R,) int64 member of each expert whose marks have the least L1 distance to the mean of its members' marks.

    With a a member's marks and c the mean, |a - c| sums to sum(c) + sum over the tokens where a = 1 of (1 - 2c).
    """
    num_routed, per_expert = routed_RM.shape
    members_FR = torch.zeros(width, num_routed)
    members_FR[routed_RM.flatten(), torch.arange(num_routed).repeat_interleave(per_expert)] = 1 / per_expert
    rates_F = torch.bincount(marks_TA.flatten(), minlength=width)
    distances_FR = rates_F[:, None] - 2 * co_marks(marks_TA, members_FR)
    nearest_R = distances_FR.gather(0, routed_RM.T).argmin(0)
    return routed_RM.gather(1, nearest_R[:, None])[:, 0]
