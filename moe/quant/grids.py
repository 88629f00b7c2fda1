"""Grids: the values that a weight or an activation may take once it is quantised.

A grid splits the columns of a matrix into groups, gives each row of a group a scale (and, where it is asymmetric, a zero point)
and rounds to codes. Weights are (..., P, Q) with the reduced dimension last; activations (..., Q) have one group per token.

A grid may be rotated: what is rounded is then V H, H a block-diagonal orthonormal Hadamard matrix, which spreads an outlier over
its block (QuaRot, Ashkboos et al., arXiv 2404.00456; DuQuant, Lin et al., arXiv 2406.01721, on which EAQuant is built, rotates in
blocks of 128 too). Rotating inputs and weights alike leaves their products as they are. `scales`, `encode`, `decode` and `round`
work on what is rotated already; `nearest`, `simulate` and `Rounded.dequantize` take and give values as they are without.

Legend: P output rows, Q reduced columns, G groups of Q, g columns of a group.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moe.kernels.quantized import FP8, FP8_MAX
from moe.kernels.rounding import integer_codes, integer_scales, positive_scale

# Magnitudes of e2m1 (OCP Microscaling Formats 1.0, table 5), by the three low bits of a code; the fourth is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_LARGEST_EXPONENT = 2  # 4 = 2 ** 2 is the largest power of two
_E2M1_ROUNDS_UP = 1.75  # halfway from the largest mantissa, 1.5, to the next power of two


ROTATION = 128  # columns of a block of H, or the largest power of two below that divides the width


@cache
def hadamard(size: int) -> Tensor:
    """(size, size) fp32 symmetric and orthonormal, Sylvester's; ``size`` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Of the groups of a matrix, fp32 with the values that are stored.

    Attributes:
        scale: (..., P, G), positive and finite.
        zero: (..., P, G) whole numbers, the code that stands for 0; ``None`` where that is code 0.
    """

    scale: Tensor
    zero: Tensor | None = None

    def of_group(self, group: int) -> "Scales":
        """Of one group, (..., P, 1)."""
        here = slice(group, group + 1)
        return Scales(scale=self.scale[..., here], zero=None if self.zero is None else self.zero[..., here])


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """See the module.

    Attributes:
        group_size: columns that share a scale; ``None`` where a whole row does.
        rotated: see the module.
    """

    group_size: int | None = None
    rotated: bool = False

    def turn(self, values: Tensor) -> Tensor:
        """(..., Q) times H, which is its own inverse, where the grid is rotated; fp32."""
        size = math.gcd(values.shape[-1], ROTATION) if self.rotated else 1
        if size == 1:
            return values
        blocks = values.float().unflatten(-1, (-1, size))
        return (blocks @ hadamard(size).to(values.device)).flatten(-2)

    @property
    @abstractmethod
    def num_bits(self) -> int:
        """Bits of a code."""

    def check(self, num_columns: int, name: str) -> None:
        """Raise a ValueError where groups do not divide a matrix."""
        if self.group_size is not None and num_columns % self.group_size:
            divisors = [size for size in (128, 64, 32, 16) if num_columns % size == 0]
            fix = f"use --group-size {divisors[0]}" if divisors else "use a scale per row, --group-size 0"
            raise ValueError(f"group_size={self.group_size} does not divide the {num_columns} columns of {name}; {fix}")

    def grouped(self, values: Tensor) -> Tensor:
        """(..., Q) as (..., G, g)."""
        return values.unflatten(-1, (-1, self.group_size or values.shape[-1]))

    @abstractmethod
    def scales(self, values: Tensor, stored: torch.dtype = torch.float32, clip: float = 1.0) -> Scales:
        """Scales by which the largest values of each group, times ``clip``, just fit.

        Args:
            values: (..., P, Q) finite, floating.
            stored: dtype of the scales in a checkpoint, to which they are rounded here, so that codes belong to them.
            clip: in (0, 1].
        """

    @abstractmethod
    def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Nearest codes, in the dtype of ``codes``; the three broadcast against each other."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """fp32 values of codes; the three broadcast."""

    def round(self, values: Tensor, scales: Scales) -> "Rounded":
        """Round a whole matrix (..., P, Q) to nearest."""
        zero = None if scales.zero is None else scales.zero[..., None]
        codes = self.encode(self.grouped(values.float()), scales.scale[..., None], zero).flatten(-2)
        return Rounded(codes=codes, scales=scales, grid=self)

    def nearest(self, values: Tensor, stored: torch.dtype = torch.float32) -> "Rounded":
        """Round to nearest with scales of its own."""
        turned = self.turn(values)
        return self.round(turned, self.scales(turned, stored))

    def simulate(self, values: Tensor) -> Tensor:
        """What quantised arithmetic sees of ``values`` (..., Q): codes times scales, in the dtype of ``values``."""
        return self.nearest(values).dequantize().to(values.dtype)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A quantised matrix, or a stack of them.

    Attributes:
        codes: (..., P, Q): int8 integers, float8_e4m3fn, or uint8 with a e2m1 code in the low four bits.
        scales: of its groups.
        grid: that it is on.
    """

    codes: Tensor
    scales: Scales
    grid: Grid

    def dequantize(self) -> Tensor:
        """(..., P, Q) fp32."""
        zero = None if self.scales.zero is None else self.scales.zero[..., None]
        turned = self.grid.decode(self.grid.grouped(self.codes), self.scales.scale[..., None], zero).flatten(-2)
        return self.grid.turn(turned)


@dataclass(frozen=True, kw_only=True)
class IntGrid(Grid):
    """Signed integers, ``-2 ** (bits - 1)`` and up.

    Attributes:
        bits: 2 to 8.
        symmetric: zero is code 0; else each group has a zero point. Scales are those of compressed-tensors 0.20
            (``calculate_qparams``).
    """

    bits: int
    symmetric: bool = True

    @property
    def num_bits(self) -> int:
        """See `Grid`."""
        return self.bits

    def scales(self, values: Tensor, stored: torch.dtype = torch.float32, clip: float = 1.0) -> Scales:
        """See `Grid`."""
        scale, zero = integer_scales(self.grouped(values.float() * clip), self.bits, self.symmetric, stored)
        return Scales(scale=scale.float(), zero=zero)

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See `Grid`."""
        return integer_codes(values, scale, zero, self.bits)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See `Grid`."""
        return (codes.float() if zero is None else codes.float() - zero) * scale


@dataclass(frozen=True, kw_only=True)
class Fp8Grid(Grid):
    """float8 e4m3 without infinities, largest value 448."""

    @property
    def num_bits(self) -> int:
        """See `Grid`."""
        return 8

    def scales(self, values: Tensor, stored: torch.dtype = torch.float32, clip: float = 1.0) -> Scales:
        """See `Grid`."""
        most = self.grouped(values.float() * clip).abs().amax(-1)
        return Scales(scale=positive_scale(most / FP8_MAX, stored, FP8_MAX + 1).float())

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See `Grid`."""
        return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)  # the cast alone need not saturate

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See `Grid`."""
        return codes.float() * scale


@dataclass(frozen=True, kw_only=True)
class Mxfp4Grid(Grid):
    """e2m1 with a power of two per 32 columns (OCP Microscaling Formats 1.0)."""

    group_size: int | None = 32

    @property
    def num_bits(self) -> int:
        """See `Grid`."""
        return 4

    def scales(self, values: Tensor, stored: torch.dtype = torch.float32, clip: float = 1.0) -> Scales:
        """The power of two of the largest magnitude, rounded to e2m1's mantissa, less e2m1's largest exponent.

        The standard leaves the choice open; this is that of compressed-tensors 0.20 (``generate_mx_scales``), by which 7 does not
        become 6. It gives a group of zeros the scale 2 ** -127, which is 0 where hardware drops subnormals; here that is 1.
        """
        most = self.grouped(values.float() * clip).abs().amax(-1)
        mantissa, exponent = torch.frexp(most)  # mantissa in [0.5, 1) times 2 ** exponent
        exponent = exponent - 1 - _E2M1_LARGEST_EXPONENT + (mantissa >= _E2M1_ROUNDS_UP / 2)
        exponent = torch.where(most > 0, exponent, 0).clamp(-126, 125)  # 6 times 2 ** 125 is finite
        return Scales(scale=torch.ldexp(torch.ones_like(most), exponent))

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Ties go to the even mantissa, as in IEEE 754."""
        magnitude = (values / scale).abs()
        levels = torch.tensor(E2M1, device=values.device)
        middles = (levels[1:] + levels[:-1]) / 2
        code = torch.bucketize(magnitude, middles)  # a tie goes down
        is_tie = magnitude == middles[code.clamp_max(len(E2M1) - 2)]
        code = code + (is_tie & (code % 2 == 1))
        return (code + 8 * (values < 0)).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See `Grid`."""
        levels = torch.tensor([*E2M1, *(-level for level in E2M1)], device=codes.device)
        return levels[codes.long()] * scale


def with_group_size(grid: Grid, group_size: int | None) -> Grid:
    """The grid with other groups."""
    return replace(grid, group_size=group_size)
