"""From a law's model, whose width and depth are real numbers, to one that can be built and runs well."""

import math
from dataclasses import dataclass

from moe.scaling.laws.law import Law
from moe.scaling.laws.size import WIDTH_PER_BLOCK, ModelSize

_FAR = 0.05  # relative difference in parameters beyond which it is another model; weighs as much as a shape e times off
_STRETCHES = (0.8, 0.9, 1.0, 1.1, 1.2)  # of the FFN: in small models a block more is too much
_HIDDEN_MULTIPLE = 16  # of an expert's width: the K of a tensor-core product


@dataclass(frozen=True, kw_only=True)
class WholeShape:
    """A decoder's shape.

    Attributes:
        width: d, a multiple of the head dimension.
        blocks: n.
        head_dim: 64, in narrow models 32 or 16.
        intermediate: width of the dense SwiGLU FFN, or of G experts together.
        size: the same as a law counts it.
    """

    width: int
    blocks: int
    head_dim: int
    intermediate: int
    size: ModelSize


def whole_shape(law: Law, size: ModelSize, max_total: float | None = None) -> WholeShape:
    """The shape that is closest both to the parameters of ``size``, active and total, and to d = 64 n.

    FFNs are SwiGLU of three matrices whatever the law was fitted on, with the law's number of parameters.

    Raises:
        ValueError: no shape is within 5 %, or none with at most ``max_total`` parameters, embedding and head included.
    """
    head_dim = 64 if size.width >= 512 else 32 if size.width >= 256 else 16
    found = []
    for blocks in range(max(math.floor(0.7 * size.blocks), 1), math.ceil(1.45 * size.blocks) + 1):
        ideal = size.width * math.sqrt(size.blocks / blocks)
        for steps in range(max(math.floor(0.9 * ideal / head_dim), 1), math.ceil(1.1 * ideal / head_dim) + 1):
            found += [_shape(steps * head_dim, blocks, head_dim, stretch, size) for stretch in _STRETCHES]
    found = [shape for shape in found if max_total is None or shape.size.total <= max_total]
    if not found:
        raise ValueError(f"no shape near {size.total:.4g} parameters has at most {max_total:g}; raise --max-params")
    best = min(found, key=lambda shape: _error(law, shape.size, size) / _FAR + _distortion(shape, size))
    if _error(law, best.size, size) > _FAR:
        raise ValueError(
            f"no shape is within {_FAR:.0%} of {size.active:.3g} active and {size.total:.3g} total parameters with a vocabulary of "
            f"{size.vocab}; raise --budget or --max-params, or lower --max-experts"
        )
    return best


def _shape(width: int, blocks: int, head_dim: int, stretch: float, size: ModelSize) -> WholeShape:
    granularity = round(size.granularity)
    hidden = max(round(stretch * size.ffn * width / (3 * granularity) / _HIDDEN_MULTIPLE), 1) * _HIDDEN_MULTIPLE
    actual = ModelSize(
        width=width,
        blocks=blocks,
        expansion=size.expansion,
        granularity=size.granularity,
        ffn=3 * granularity * hidden / width,
        vocab=size.vocab,
    )
    return WholeShape(width=width, blocks=blocks, head_dim=head_dim, intermediate=granularity * hidden, size=actual)


def _error(law: Law, actual: ModelSize, wanted: ModelSize) -> float:
    """Largest relative difference in parameters, with embeddings if the law counts them."""
    pairs = [(actual.active_blocks, wanted.active_blocks), (actual.total_blocks, wanted.total_blocks)]
    if law.counted == "active":
        pairs = [(actual.active, wanted.active), (actual.total, wanted.total)]
    return max(abs(math.log(got / expected)) for got, expected in pairs)


def _distortion(shape: WholeShape, wanted: ModelSize) -> float:
    """How far depth and FFN are from the rules, in logarithms."""
    depth = shape.width / (WIDTH_PER_BLOCK * shape.blocks)
    return abs(math.log(depth)) + abs(math.log(shape.size.ffn / wanted.ffn))
