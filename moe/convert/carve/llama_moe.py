"""LLaMA-MoE's split: neurons dealt out at random, and a gate that starts at random (github.com/pjlab-sys4nlp/llama-moe).

Random groups were the best start for its continued training over 200 billion tokens, which is what makes the gate. Without
that training it is a baseline; a fitted linear gate (`fit_linear_gate`) shows how much of the loss is the gate's.

Legend: D model, F neurons, R routed experts, m neurons of an expert.
"""

import torch

from moe.convert.carve.types import CarveShape, Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN


@torch.no_grad()
def carve(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """A random partition and a random gate; the inputs are not looked at."""
    per_expert = shape.check(ffn.width)
    order_F = torch.randperm(ffn.width, generator=generator)
    num_shared = shape.num_shared * per_expert
    gate = LinearGate(
        weight_RD=torch.randn(shape.num_routed, ffn.up_FD.shape[1], generator=generator),
        bias_R=torch.zeros(shape.num_routed),
    )
    return Carving(
        shared_M=order_F[:num_shared], routed_RM=order_F[num_shared:].view(shape.num_routed, per_expert), gate=gate
    )
