"""Carving: the FFN of a dense decoder cut into shared and routed experts. One method per file; `CARVERS` names them.

Adding one: a file here with a function of `Carver`'s form, a line in `CARVERS`, a test file.
"""

from collections.abc import Callable

import torch

from moe.convert.carve import cmoe, llama_moe, static, weaver
from moe.convert.carve.best import carve_best
from moe.convert.carve.types import CarveShape, Carving, LayerInputs, NeuronGate
from moe.convert.dense import DenseFFN

Carver = Callable[[DenseFFN, LayerInputs, CarveShape, torch.Generator], Carving]

CARVERS: dict[str, Carver] = {
    "best": carve_best,
    "cmoe": cmoe.carve,
    "weaver": weaver.carve,
    "llama-moe": llama_moe.carve,
    "static": static.carve,
}

# Gates of methods whose own gate is not linear.
OWN_GATES: dict[str, type] = {"cmoe": NeuronGate}

__all__ = ["CARVERS", "OWN_GATES", "Carver"]
