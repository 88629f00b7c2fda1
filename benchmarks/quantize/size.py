"""Size of a quantised model, counted from shapes: of a file with packed codes, even where no server has such a format."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.modeling import MoEForCausalLM
from moe.quant.grids import Fp8Grid, Grid, IntGrid, Mxfp4Grid
from moe.quant.layer import matrices
from moe.quant.options import QuantOptions

_SCALE_BITS = {IntGrid: 16, Fp8Grid: 16, Mxfp4Grid: 8}
_REST_BITS = 16


def megabytes(config: PreTrainedConfig, options: QuantOptions | None) -> float:
    """10^6 bytes of all tensors; in bf16 without options. Selection biases and the like count as bf16."""
    assert isinstance(config, MoEConfig), "the models are in our own format"
    with torch.device("meta"):
        model: Any = MoEForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters()) * _REST_BITS
    if options is not None:
        grid = options.resolved().weights
        for layer in model.model.layers:
            for matrix in matrices(layer):
                rows, columns = matrix.weight_PQ.shape
                total += matrix_bits(grid, rows, columns) - rows * columns * _REST_BITS
    return total / 8e6


def matrix_bits(grid: Grid, rows: int, columns: int) -> int:
    """Codes, scales and zero points."""
    groups = rows * (columns // (grid.group_size or columns))
    if isinstance(grid, IntGrid):
        zero = 0 if grid.symmetric else grid.num_bits
        return rows * columns * grid.num_bits + groups * (_SCALE_BITS[IntGrid] + zero)
    bits = 4 if isinstance(grid, Mxfp4Grid) else 8
    return rows * columns * bits + groups * _SCALE_BITS[type(grid)]
