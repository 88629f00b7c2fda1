"""Ways to choose the codes of a matrix, by the name that ``--method`` uses.

Adding one: a file here, a line in `ROUNDERS`, a test.
"""

from moe.quant.rounding.clip import Clipped
from moe.quant.rounding.gptq import Gptq
from moe.quant.rounding.rounder import Rounder
from moe.quant.rounding.rtn import Nearest

ROUNDERS: dict[str, Rounder] = {
    "rtn": Nearest(),
    "clip": Clipped(),
    "gptq": Gptq(),
}

__all__ = ["ROUNDERS", "Rounder"]
