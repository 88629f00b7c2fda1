"""An FFN whose experts are known: tokens of topic r activate the neurons of group r, and everything activates the shared ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.convert.carve.types import CarveShape, LayerInputs
from moe.convert.dense import DenseFFN

SHAPE = CarveShape(num_experts=6, num_shared=2, top_k=1)
D, M = 16, 4
R = SHAPE.num_routed
F = SHAPE.num_experts * M


@dataclass(frozen=True, kw_only=True)
class Planted:
    """The FFN, its tokens, and who belongs where.

    Attributes:
        expert_F: group of each neuron, R for the shared ones.
        topic_T: group of each token.
    """

    ffn: DenseFFN
    inputs: LayerInputs
    expert_F: Tensor
    topic_T: Tensor


def plant(seed: int = 0, num_tokens: int = 1200, noise: float = 0.1) -> Planted:
    """Gates open (+4) on their own topic and close (-4 or so) on others; neurons are shuffled."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    axes_DD = torch.linalg.qr(normal(D, D)).Q
    expert_F = torch.arange(SHAPE.num_experts).clamp_max(R).repeat_interleave(M)[torch.randperm(F, generator=generator)]
    topic_T = torch.randint(R, (num_tokens,), generator=generator)
    common_D = axes_DD[R]
    gates_ED = torch.cat((8 * axes_DD[:R] - 4 * common_D, 4 * common_D[None]))
    ffn = DenseFFN(gate_FD=gates_ED[expert_F] + 0.1 * normal(F, D), up_FD=normal(F, D), down_DF=normal(D, F))
    x_TD = axes_DD[topic_T] + common_D + noise * normal(num_tokens, D)
    inputs = LayerInputs(
        x_TD=x_TD, weights_T=normal(num_tokens).mul(0.3).exp(), sequence_T=torch.arange(num_tokens) * 4 // num_tokens
    )
    return Planted(ffn=ffn, inputs=inputs, expert_F=expert_F, topic_T=topic_T)


def same_groups(one_N: Tensor, other_N: Tensor) -> bool:
    """Whether two labellings are the same up to the labels' names."""
    return torch.equal(one_N[:, None] == one_N, other_N[:, None] == other_N)
