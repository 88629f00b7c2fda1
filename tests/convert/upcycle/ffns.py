"""FFNs whose matrices differ in their moments, and which rows of a matrix are in another one."""

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN

WIDTH, DIM = 400, 24


def make_ffn(dtype: torch.dtype = torch.float32) -> DenseFFN:
    """Matrices of different means and deviations."""
    shapes = {"gate_FD": (WIDTH, DIM), "up_FD": (WIDTH, DIM), "down_DF": (DIM, WIDTH)}
    moments = {"gate_FD": (0.5, 0.1), "up_FD": (-0.2, 0.3), "down_DF": (0.0, 0.02)}
    return DenseFFN(**{name: (torch.randn(shapes[name]) * s + m).to(dtype) for name, (m, s) in moments.items()})


def matrices(ffn: DenseFFN) -> list[Tensor]:
    """All three with neurons in rows."""
    assert ffn.gate_FD is not None
    return [ffn.gate_FD, ffn.up_FD, ffn.down_DF.T]


def kept_rows(before: Tensor, after: Tensor) -> dict[int, int]:
    """Row of ``before`` by the row of ``after`` that is the same."""
    where = {tuple(row.tolist()): index for index, row in enumerate(before)}
    return {row: where[key] for row, value in enumerate(after) if (key := tuple(value.tolist())) in where}
