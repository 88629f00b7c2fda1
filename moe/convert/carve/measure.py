"""How well a carving does on its own layer.

Legend: T tokens, D model, R routed experts.
"""

from dataclasses import dataclass

import torch

from moe.convert.carve.gates import best, carved_output, expert_energy, scores
from moe.convert.carve.neurons import chunks, output
from moe.convert.carve.types import Carving, LayerInputs
from moe.convert.dense import DenseFFN

_MOST_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """Measured on calibration tokens, so on text that the carving has seen.

    Attributes:
        energy_kept: 1 - (weighted squared error of the output) / (weighted squared dense output).
        recall: of the K experts with the most energy for a token, the share that the gate chooses, on average.
        least_load, most_load: tokens of the least and the most used routed expert, relative to a balanced load.
    """

    energy_kept: float
    recall: float
    least_load: float
    most_load: float


@torch.no_grad()
def measure(ffn: DenseFFN, inputs: LayerInputs, carving: Carving, top_k: int) -> LayerQuality:
    """Quality on evenly spread calibration tokens."""
    step = -(-len(inputs.x_TD) // _MOST_TOKENS)
    x_TD, weights_T = inputs.x_TD[::step], inputs.weights_T[::step]
    dense_TD = output(ffn, x_TD)
    error_TD = carved_output(ffn, carving, x_TD, top_k) - dense_TD
    lost = (weights_T @ error_TD.square()).sum() / (weights_T @ dense_TD.square()).sum()
    chosen_TR = best(scores(carving.gate, x_TD), top_k)
    hits = 0.0
    for chunk in chunks(len(x_TD)):
        wanted_TR = best(expert_energy(ffn, carving.routed_RM, x_TD[chunk]), top_k)
        hits += float((wanted_TR & chosen_TR[chunk]).sum())
    load_R = chosen_TR.float().mean(0) * chosen_TR.shape[1] / top_k
    return LayerQuality(
        energy_kept=1 - float(lost),
        recall=hits / (len(x_TD) * top_k),
        least_load=float(load_R.min()),
        most_load=float(load_R.max()),
    )
