"""Checkpoint formats of MoE models: ours, and the stock architectures that servers load without our code.

Adding one: a `StockFormat` in the file of its family, a line in `FORMATS`, a case in tests/models/stock/.
"""

from moe.models.stock.format import Format
from moe.models.stock.ours import OURS
from moe.models.stock.sigmoid import DEEPSEEK_V3, DOTS1, GLM4_MOE
from moe.models.stock.softmax import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE

# By the ``model_type`` of their configs; ours is "moe".
FORMATS: dict[str, Format] = {
    "moe": OURS,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "glm4_moe": GLM4_MOE,
    "olmoe": OLMOE,
    "dots1": DOTS1,
    "deepseek_v3": DEEPSEEK_V3,
}

__all__ = ["FORMATS", "Format"]
