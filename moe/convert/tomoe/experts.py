"""From trained scores to experts of one width: which neurons are in which expert, and the weights of the MoE layers.

Experts overlap: a neuron may be in several, or in none.

Legend: L layers, E experts, F neurons of a dense FFN, W neurons of an expert, S neurons of the shared experts, D model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.tomoe.training import TrainedMasks
from moe.models.moe_weights import MoEWeights


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """Neurons of every expert.

    Attributes:
        routed_LEW: (L, E, W) int64, ascending.
        shared_LS: (L, S) int64, in every expert of the layer; S is ``num_shared`` times W, or 0.
        router_LED: fp32.
        num_neurons: F.
    """

    routed_LEW: Tensor
    shared_LS: Tensor
    router_LED: Tensor
    num_neurons: int

    @property
    def width(self) -> int:
        """W."""
        return self.routed_LEW.shape[-1]

    @property
    def num_shared(self) -> int:
        """Shared experts of width W."""
        return self.shared_LS.shape[-1] // self.width

    @property
    def active_share(self) -> float:
        """Neurons that a token passes, of all."""
        return (self.width + self.shared_LS.shape[-1]) / self.num_neurons

    @property
    def stored_share(self) -> float:
        """Neurons that are stored, copies counted, of all."""
        return (self.routed_LEW.shape[1] * self.width + self.shared_LS.shape[-1]) / self.num_neurons

    @property
    def covered_share(self) -> float:
        """Neurons that are in some expert, of all."""
        return self.masks().amax(1).mean().item()

    def masks(self) -> Tensor:
        """(L, E, F) fp32, 1 where an expert or the layer's shared experts have the neuron."""
        num_layers, num_experts, _ = self.routed_LEW.shape
        masks_LEF = torch.zeros(num_layers, num_experts, self.num_neurons)
        masks_LEF.scatter_(-1, self.routed_LEW, 1.0)
        return masks_LEF.scatter_(-1, self.shared_LS[:, None].expand(-1, num_experts, -1), 1.0)

    def layer(self, index: int, ffn: DenseFFN) -> MoEWeights:
        """The MoE layer in the place of a dense FFN, in the dtype of its weights."""
        shared = self.shared_LS[index]
        gate_up_EHD, down_EDF = zip(*(_neurons(ffn, ids) for ids in self.routed_LEW[index]), strict=True)
        shared_gate_up_HD, shared_down_DF = _neurons(ffn, shared) if len(shared) else (None, None)
        return MoEWeights(
            router={"weight": self.router_LED[index].to(ffn.up_FD.dtype)},
            gate_up_EHD=torch.stack(gate_up_EHD),
            down_EDF=torch.stack(down_EDF),
            shared_gate_up_HD=shared_gate_up_HD,
            shared_down_DF=shared_down_DF,
        )


def plan_experts(trained: TrainedMasks, active_share: float, width_multiple: int, shared: bool = False) -> ExpertPlan:
    """Experts of one width in all layers: p F neurons, rounded up.

    Training has brought the widest expert of every layer to about p F neurons of positive score. Here every expert gets its p F
    best: one a little too wide loses its worst, a narrower one gains its next best where one could pad with zeros, which
    would cost as much, while a further neuron brings the layer closer to the dense one.

    Args:
        trained: scores and routers.
        active_share: p.
        width_multiple: the width is a multiple of this.
        shared: store neurons that all experts of a layer have only once, as shared experts of the same width, as far as
            every layer has enough of them. The function is the same; less is stored, but the routed experts get narrower
            and fewer architectures express it.

    Raises:
        ValueError: rounded up, the experts are as wide as the dense FFN.
    """
    scores_LEF, num_neurons = trained.scores_LEF, trained.scores_LEF.shape[-1]
    width = expert_width(active_share, num_neurons, width_multiple)
    num_shared, width = _shared_experts(scores_LEF, width, width_multiple) if shared else (0, width)
    masks_LEF = _best(scores_LEF, width * (num_shared + 1))
    # Of what all experts have, the shared ones take the best.
    common_LF = torch.where(masks_LEF.amin(1) > 0, scores_LEF.sum(1), -math.inf)
    shared_LS = common_LF.topk(num_shared * width, dim=-1).indices.sort(-1).values
    masks_LEF.scatter_(-1, shared_LS[:, None].expand(-1, scores_LEF.shape[1], -1), 0.0)
    routed_LEW = masks_LEF.nonzero()[:, -1].view(*scores_LEF.shape[:2], width)
    return ExpertPlan(
        routed_LEW=routed_LEW, shared_LS=shared_LS, router_LED=trained.router_LED, num_neurons=num_neurons
    )


def expert_width(active_share: float, num_neurons: int, width_multiple: int) -> int:
    """Neurons of what a token passes: p F, rounded up to a multiple.

    Raises:
        ValueError: that is the whole dense FFN.
    """
    width = _round_up(math.ceil(active_share * num_neurons - 1e-6), width_multiple)
    if width >= num_neurons:
        raise ValueError(
            f"experts of tomoe.active_share={active_share} of {num_neurons} neurons, in multiples of tomoe.width_multiple="
            f"{width_multiple}, are as wide as the dense FFN; lower one of them"
        )
    return width


def _best(scores_LEF: Tensor, width: int) -> Tensor:
    """(L, E, F) 1 at the neurons of the largest scores, so many for each expert."""
    return torch.zeros_like(scores_LEF).scatter_(-1, scores_LEF.topk(width, dim=-1).indices, 1.0)


def _shared_experts(scores_LEF: Tensor, width: int, width_multiple: int) -> tuple[int, int]:
    """Number of shared experts and width of each expert, the narrowest for which every layer has neurons.

    The widths of all shared and one routed expert add up to ``width``, rounded up.
    """
    best = (0, width)
    for num_shared in range(1, width // width_multiple):
        each = _round_up(math.ceil(width / (num_shared + 1)), width_multiple)
        if each >= best[1] or (num_shared + 1) * each >= scores_LEF.shape[-1]:
            continue
        common_L = _best(scores_LEF, (num_shared + 1) * each).amin(1).sum(-1)
        if num_shared * each <= int(common_L.min()):
            best = (num_shared, each)
    return best


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _neurons(ffn: DenseFFN, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of gate and up-projection, and columns of the down-projection."""
    up_HD = ffn.up_FD[ids] if ffn.gate_FD is None else torch.cat((ffn.gate_FD[ids], ffn.up_FD[ids]))
    return up_HD, ffn.down_DF[:, ids]
