"""A small FFN with calibration inputs, and dense oracles of what a carved layer computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.convert.carve.types import CarveShape, Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN

T, D, F = 600, 10, 24
SHAPE = CarveShape(num_experts=6, num_shared=2, top_k=2)  # 4 routed experts of 4 neurons


@dataclass(frozen=True, kw_only=True)
class Case:
    """An FFN and its inputs."""

    ffn: DenseFFN
    inputs: LayerInputs


def make_case(seed: int = 0, num_tokens: int = T, gated: bool = True) -> Case:
    """Random weights; inputs with a mean, of several windows; a few tokens weigh next to nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x_TD = normal(num_tokens, D) + 0.5 * normal(D)
    weights_T = normal(num_tokens).exp()
    weights_T[::50] = 1e-6
    ffn = DenseFFN(gate_FD=normal(F, D) if gated else None, up_FD=normal(F, D), down_DF=normal(D, F))
    sequence_T = torch.arange(num_tokens) * 5 // num_tokens
    return Case(ffn=ffn, inputs=LayerInputs(x_TD=x_TD, weights_T=weights_T, sequence_T=sequence_T))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_carving(seed: int = 1, shape: CarveShape = SHAPE) -> Carving:
    """Neurons dealt at random, and a random linear gate with a bias."""
    random = generator(seed)
    order_F = torch.randperm(F, generator=random)
    num_shared = shape.num_shared * F // shape.num_experts
    gate = LinearGate(
        weight_RD=torch.randn(shape.num_routed, D, generator=random),
        bias_R=torch.randn(shape.num_routed, generator=random),
    )
    return Carving(shared_M=order_F[:num_shared], routed_RM=order_F[num_shared:].view(shape.num_routed, -1), gate=gate)


def activations(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """(T, F), by definition."""
    if ffn.gate_FD is None:
        return torch.nn.functional.gelu(x_TD @ ffn.up_FD.T)
    gate_TF = x_TD @ ffn.gate_FD.T
    return gate_TF * gate_TF.sigmoid() * (x_TD @ ffn.up_FD.T)


def oracle_mask(carving: Carving, x_TD: Tensor, top_k: int) -> Tensor:
    """(T, F) 1 where a neuron runs, token by token."""
    assert isinstance(carving.gate, LinearGate)
    mask_TF = torch.zeros(len(x_TD), F)
    mask_TF[:, carving.shared_M] = 1
    for token, x_D in enumerate(x_TD):
        scores = [float(w_D @ x_D + b) for w_D, b in zip(carving.gate.weight_RD, carving.gate.bias_R, strict=True)]
        for expert in sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]:
            mask_TF[token, carving.routed_RM[expert]] = 1
    return mask_TF
