"""Carves one layer: the method's experts, a gate, the refit.

Legend: T tokens, D model.
"""

import dataclasses
import random

import torch

from moe.convert.carve import CARVERS, OWN_GATES
from moe.convert.carve.gates import fit_linear_gate
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.refit import refit
from moe.convert.carve.types import Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN


def gate_class(options: CarveOptions) -> type:
    """Class of every layer's gate."""
    return LinearGate if options.gate == "ridge" else OWN_GATES.get(options.method, LinearGate)


@torch.no_grad()
def carve_layer(ffn: DenseFFN, inputs: LayerInputs, options: CarveOptions, layer: int) -> Carving:
    """The layer's experts.

    Args:
        ffn: its dense FFN, fp32.
        inputs: its calibration inputs.
        options: method and shape.
        layer: its index, of which random numbers depend.
    """
    seed = random.Random(f"{options.seed}/{layer}").getrandbits(32)  # torch's generator keeps 32 bits of a seed
    carving = CARVERS[options.method](ffn, inputs, options.shape, torch.Generator().manual_seed(seed))
    carving.check(ffn.width)
    if options.gate == "ridge":
        gate = fit_linear_gate(ffn, inputs, carving.routed_RM)
        carving = dataclasses.replace(carving, gate=gate, down_DF=None)  # a refit was to the method's own gate
    assert isinstance(carving.gate, gate_class(options))
    if not options.refit:
        return dataclasses.replace(carving, down_DF=None)
    return carving if carving.down_DF is not None else refit(ffn, inputs, carving, options.shape.top_k)
