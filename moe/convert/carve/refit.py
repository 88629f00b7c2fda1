"""Refit of the down-projection: the neurons that run learn to give what those that do not would have given.

For each token n let h_n be the dense FFN's activations and m_n the mask of the neurons that run. The new down-projection W
minimises sum_n w_n |W (m_n h_n) - Wd h_n|^2 + |(W - Wd) diag(lambda)^(1/2)|^2, a ridge regression toward the dense Wd, solved
in closed form. The penalty of a neuron is a share of its own mean square.

Legend: T tokens, D model, F neurons.
"""

import dataclasses

import torch

from moe.convert.carve.gates import running_neurons
from moe.convert.carve.neurons import chunks, hidden
from moe.convert.carve.ridge import solve_ridge
from moe.convert.carve.types import Carving, LayerInputs
from moe.convert.dense import DenseFFN

# Lambda, of each diagonal entry. With less the calibration text is fitted better and other text worse, by pruned models as well.
SHARE = 0.1


@torch.no_grad()
def refit(ffn: DenseFFN, inputs: LayerInputs, carving: Carving, top_k: int, share: float = SHARE) -> Carving:
    """The carving with a down-projection fitted to its own gate's choices.

    Args:
        ffn: the dense FFN, fp32.
        inputs: calibration tokens.
        carving: of this FFN; a down-projection that it has is fitted anew.
        top_k: K.
        share: lambda, of each neuron's mean square.
    """
    width, dim = ffn.width, len(ffn.down_DF)
    weights_T = inputs.weights_T / inputs.weights_T.sum()
    gram_FF, cross_FD = inputs.x_TD.new_zeros(width, width), inputs.x_TD.new_zeros(width, dim)
    for chunk in chunks(len(inputs.x_TD)):
        all_TF = hidden(ffn, inputs.x_TD[chunk])
        kept_TF = all_TF * running_neurons(carving, inputs.x_TD[chunk], top_k)
        weighted_FT = (kept_TF * weights_T[chunk, None]).T
        missing_TD = (all_TF - kept_TF) @ ffn.down_DF.T
        gram_FF.addmm_(weighted_FT, kept_TF)
        cross_FD.addmm_(weighted_FT, missing_TD)
    change_FD = solve_ridge(gram_FF, cross_FD, share)
    return dataclasses.replace(carving, down_DF=ffn.down_DF + change_FD.T)
