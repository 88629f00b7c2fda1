"""Training-free carving with a linear gate, so that stock architectures can hold the result.

1. What every neuron is worth after the others have taken over what they can (`saliency`), spread over the tokens as h^2 is.
2. Who runs together, by alternating between a gate's tokens and an expert's neurons (`grouping`).
3. The gate (`gate_fit`), and the down-projection refitted to its choices (`moe.convert.carve.refit`).

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert.
"""

import torch
from torch import Tensor

from moe.convert.carve.best.gate_fit import fit_gate
from moe.convert.carve.best.grouping import expert_energy, group_neurons
from moe.convert.carve.best.saliency import saliencies
from moe.convert.carve.neurons import chunks, hidden
from moe.convert.carve.refit import refit
from moe.convert.carve.types import CarveShape, Carving, LayerInputs
from moe.convert.dense import DenseFFN

_GRAM_TOKENS = 16384  # the Gram matrix of the hidden activations, F^2 of work each
_GROUPING_TOKENS = 8192  # whose activations are in memory at once
# Far more than fits the calibration text best: on text that it has not seen, the error is smallest around here, and on text of
# another kind still falling.
REFIT_SHARE = 0.3


@torch.no_grad()
def carve_best(ffn: DenseFFN, inputs: LayerInputs, shape: CarveShape, generator: torch.Generator) -> Carving:
    """Experts, gate, and down-projection.

    Args:
        ffn: the dense FFN, fp32.
        inputs: calibration tokens; of many, evenly spread ones decide on the experts, all on the down-projection.
        shape: numbers of experts.
        generator: draws where the grouping starts.
    """
    per_expert = shape.check(ffn.width)
    worth_F = _worth(ffn, inputs, shape.num_shared * per_expert)
    some = _spread(inputs, _GROUPING_TOKENS)
    expert_F = group_neurons(_energy(ffn, some, worth_F), some.x_TD, shape, generator)

    many = _spread(inputs, _GRAM_TOKENS)
    energy_TR = torch.cat(
        [
            expert_energy(_energy(ffn, _part(many, chunk), worth_F), expert_F, shape.num_routed)
            for chunk in chunks(len(many.x_TD))
        ]
    )
    order_F = expert_F.argsort(stable=True)
    num_routed = shape.num_routed * per_expert
    carving = Carving(
        shared_M=order_F[num_routed:],
        routed_RM=order_F[:num_routed].view(shape.num_routed, per_expert),
        gate=fit_gate(energy_TR, many.x_TD, shape.top_k),
    )
    return refit(ffn, inputs, carving, shape.top_k, REFIT_SHARE)


def _worth(ffn: DenseFFN, inputs: LayerInputs, num_shared: int) -> Tensor:
    """(F,) factor of h^2: saliency per energy of the activation; 0 of a neuron that is never active."""
    inputs = _spread(inputs, _GRAM_TOKENS)
    gram_FF = inputs.x_TD.new_zeros(ffn.width, ffn.width)
    for chunk in chunks(len(inputs.x_TD)):
        h_TF = hidden(ffn, inputs.x_TD[chunk])
        gram_FF.addmm_((h_TF * inputs.weights_T[chunk, None]).T, h_TF)
    square_F = gram_FF.diagonal()
    return torch.where(square_F > 0, saliencies(gram_FF, ffn.down_DF, num_shared) / square_F, 0.0)


def _energy(ffn: DenseFFN, inputs: LayerInputs, worth_F: Tensor) -> Tensor:
    """(T, F) weighted h^2 by what it is worth."""
    return hidden(ffn, inputs.x_TD).square_().mul_(worth_F).mul_(inputs.weights_T[:, None])


def _spread(inputs: LayerInputs, most: int) -> LayerInputs:
    """At most that many tokens, evenly spread over the windows, and weights that sum to 1."""
    num_tokens = len(inputs.x_TD)
    few = min(num_tokens, most)
    # Not every n-th: a window's length is a multiple of most n, and its first token is unlike the others.
    kept = _part(inputs, torch.arange(few) * num_tokens // few)
    return LayerInputs(x_TD=kept.x_TD, weights_T=kept.weights_T / kept.weights_T.sum(), sequence_T=kept.sequence_T)


def _part(inputs: LayerInputs, which: slice | Tensor) -> LayerInputs:
    """Some of the tokens."""
    return LayerInputs(x_TD=inputs.x_TD[which], weights_T=inputs.weights_T[which], sequence_T=inputs.sequence_T[which])
