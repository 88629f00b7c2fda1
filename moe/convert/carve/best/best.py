"""Training-free carving with a linear gate, so that stock architectures can hold the result.

1. Who runs together, by alternating between a gate's tokens and an expert's neurons (`grouping`).
2. The gate: logistic regressions weighted by what a wrong choice costs (`gate_fit`).
3. The down-projection, refitted to the gate's choices with a strong penalty (`moe.convert.carve.refit`).

What a neuron is worth to a token is h^2 |wd|^2, also where others could take over its work after the refit. Counting only what
nothing else can replace (as optimal brain surgery does) lowers every layer's error on text like the calibration text, but not the
model's perplexity on it, and on other text neurons do not replace each other in the same way: there it does much harm.

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert.
"""

import torch
from torch import Tensor

from moe.convert.carve.best.gate_fit import fit_gate
from moe.convert.carve.best.grouping import group_neurons
from moe.convert.carve.gates import expert_energy
from moe.convert.carve.neurons import chunks, hidden
from moe.convert.carve.refit import refit
from moe.convert.carve.types import CarveShape, Carving, LayerInputs
from moe.convert.dense import DenseFFN

_GROUPING_TOKENS = 8192  # whose activations are in memory at once
_GATE_TOKENS = 32768
# Far more than fits the calibration text best: on text that it has not seen, the error is smallest around here.
REFIT_SHARE = 0.3


@torch.no_grad()
def carve_best(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """Experts, gate, and down-projection.

    Args:
        ffn: the dense FFN, fp32.
        inputs: calibration tokens; of many, evenly spread ones decide on experts and gate, all on the down-projection.
        shape: numbers of experts.
        generator: draws where the grouping starts.
    """
    per_expert = shape.check(ffn.width)
    some = _spread(inputs, _GROUPING_TOKENS)
    energy_TF = hidden(ffn, some.x_TD).square_().mul_(ffn.down_DF.square().sum(0)).mul_(some.weights_T[:, None])
    expert_F = group_neurons(energy_TF, some.x_TD, shape, generator)
    del energy_TF

    order_F = expert_F.argsort(stable=True)
    num_routed = shape.num_routed * per_expert
    routed_RM = order_F[:num_routed].view(shape.num_routed, per_expert)
    many = _spread(inputs, _GATE_TOKENS)
    energy_TR = torch.cat([expert_energy(ffn, routed_RM, many.x_TD[chunk]) for chunk in chunks(len(many.x_TD))])
    gate = fit_gate(energy_TR.mul_(many.weights_T[:, None]), many.x_TD, shape.top_k)
    carving = Carving(shared_M=order_F[num_routed:], routed_RM=routed_RM, gate=gate)
    return refit(ffn, inputs, carving, shape.top_k, REFIT_SHARE)


def _spread(inputs: LayerInputs, most: int) -> LayerInputs:
    """At most that many tokens, evenly spread over the windows, and weights that sum to 1."""
    num_tokens = len(inputs.x_TD)
    few = min(num_tokens, most)
    # Not every n-th: a window's length is a multiple of most n, and its first token is unlike the others.
    kept_T: Tensor = torch.arange(few) * num_tokens // few
    weights_T = inputs.weights_T[kept_T]
    return LayerInputs(
        x_TD=inputs.x_TD[kept_T], weights_T=weights_T / weights_T.sum(), sequence_T=inputs.sequence_T[kept_T]
    )
