"""Pruning without a choice per token: the control that every carving has to beat.

The neurons with the most output energy run for every token, the rest never: as many as K of the R routed experts and the shared
ones. In the form of a carving, the gate's bias chooses the same K routed experts for all tokens.

Legend: D model, F neurons, R routed experts, m neurons of an expert.
"""

import torch

from moe.convert.carve.neurons import energy
from moe.convert.carve.types import CarveShape, Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN


@torch.no_grad()
def carve(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """Neurons in the order of their energy; nothing is drawn from the generator."""
    per_expert = shape.check(ffn.width)
    order_F = energy(ffn, inputs.x_TD, inputs.weights_T).argsort(descending=True, stable=True)
    num_shared = shape.num_shared * per_expert
    gate = LinearGate(
        weight_RD=torch.zeros(shape.num_routed, inputs.x_TD.shape[1]),
        bias_R=torch.linspace(1, -1, shape.num_routed),
    )
    return Carving(
        shared_M=order_F[:num_shared], routed_RM=order_F[num_shared:].view(shape.num_routed, per_expert), gate=gate
    )
