"""What rows look like on the wire: as they are, in bf16, or in fp8 with a scale per row.

fp8 is e4m3 (OCP 8-bit floating point): a row is divided by its largest magnitude over 448, so an element's error is at most
2^-4 of itself, or 2^-10 of that scale for the smallest ones. Gradients pass as if nothing had been rounded, and are
rounded the same way when they travel. A row with a NaN or an infinity arrives as NaN.

Legend: R rows, D model, B bytes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_SCALE_BYTES = 4


class Payload(Protocol):
    """A wire format of rows."""

    def encode(self, rows_RD: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a model in ``dtype`` (they may be fp32 sums) for the wire: (R, D) -> (R, anything)."""

    def decode(self, wire: Tensor) -> Tensor:
        """From the wire to numbers: (R, D) in some floating dtype."""

    def row_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of a row of D elements of a model in ``dtype``."""


@dataclass(frozen=True)
class _Cast:
    """Rows in a dtype; ``None`` is the model's."""

    dtype: torch.dtype | None

    def encode(self, rows_RD: Tensor, dtype: torch.dtype) -> Tensor:
        return rows_RD.to(self.dtype or dtype)

    def decode(self, wire: Tensor) -> Tensor:
        return wire

    def row_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return dim * (self.dtype or dtype).itemsize


class _Fp8:
    """e4m3 bytes, and behind them the row's fp32 scale."""

    def encode(self, rows_RD: Tensor, dtype: torch.dtype) -> Tensor:
        rows_RD = rows_RD.float()
        largest_R1 = rows_RD.abs().amax(dim=1, keepdim=True)
        # not below the smallest normal number: the quotient would overflow
        scale_R1 = torch.where(largest_R1 == 0, 1.0, (largest_R1 / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny))
        bytes_RD = (rows_RD / scale_R1).to(_FP8).view(torch.uint8)
        scale_bytes = scale_R1.flatten().view(torch.uint8).view(-1, _SCALE_BYTES)
        return torch.cat([bytes_RD, scale_bytes], dim=1)

    def decode(self, wire: Tensor) -> Tensor:
        # a copy: no rows count as contiguous in any layout
        scale_R = wire[:, -_SCALE_BYTES:].flatten().clone().view(torch.float32)
        return wire[:, :-_SCALE_BYTES].view(_FP8).float() * scale_R[:, None]

    def row_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return dim + _SCALE_BYTES


MODEL: Payload = _Cast(None)
PAYLOADS: dict[str, Payload] = {"model": MODEL, "bf16": _Cast(torch.bfloat16), "fp8": _Fp8()}
