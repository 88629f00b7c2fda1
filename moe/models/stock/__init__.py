"""Checkpoint formats of MoE models: ours, and the stock architectures that servers load without our code.

Adding one: a file here with a `Format`, a line in `FORMATS`, a test file.
"""

from moe.models.stock.format import Format
from moe.models.stock.ours import OURS

FORMATS: dict[str, Format] = {
    "moe": OURS,
}

__all__ = ["FORMATS", "Format"]
