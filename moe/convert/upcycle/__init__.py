"""Upcycling: a dense model becomes an MoE with more parameters and the same, or nearly the same, function.

Adding a method: a file here with an `Upcycler`, a line in `UPCYCLERS`, a test file.
"""

from moe.convert.upcycle.btx import BranchTrainMix
from moe.convert.upcycle.copies import Copy
from moe.convert.upcycle.drop import Drop
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.noise import Noise
from moe.convert.upcycle.options import UpcycleOptions
from moe.convert.upcycle.virtual_group import VirtualGroup

UPCYCLERS: dict[str, Upcycler] = {
    "copy": Copy(),
    "drop": Drop(),
    "noise": Noise(),
    "virtual-group": VirtualGroup(),
    "btx": BranchTrainMix(),
}

__all__ = ["UPCYCLERS", "UpcycleOptions", "Upcycler"]
