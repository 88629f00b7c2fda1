"""Compute-optimal models: the size, data and experts with the lowest predicted loss for a number of training FLOPs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe.scaling.laws.law import FLOPS, Law
from moe.scaling.laws.size import ModelSize

# Of the search, in blocks of the papers' shape d = 64 n: from 12k to 10^15 active parameters.
_LOG_BLOCKS = (math.log(0.6), math.log(3000.0))
_GOLDEN = (math.sqrt(5) - 1) / 2
_MOST_GRANULAR = 64  # of arXiv 2402.07871 table 2; a law fitted on less says so


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """A model and how long to train it.

    Attributes:
        size: the model.
        tokens: D.
        loss: predicted, in nats per token.
        extrapolations: what lies outside the range that the law was fitted on.
    """

    size: ModelSize
    tokens: float
    loss: float
    extrapolations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model must keep to.

    Attributes:
        max_experts: of a block.
        active: exactly these active parameters, embedding and head included.
        max_total: parameters, embedding and head included.
    """

    max_experts: int | None = None
    active: float | None = None
    max_total: float | None = None


def compute_optimal(law: Law, flops: float, vocab: int, limits: Limits | None = None) -> list[Optimum]:
    """The best model for every expansion rate and granularity that is tried, best first.

    Expansion rates are those of the law, or powers of two up to the largest fitted, or up to ``limits.max_experts`` where that
    is given; granularities those of the law, or powers of two up to 64.

    Raises:
        ValueError: the budget is not positive, or no model keeps to the limits.
    """
    if not flops > 0:
        raise ValueError(f"--budget {flops:g} must be positive")
    limits = limits or Limits()
    found = []
    for expansion, granularity in _kinds(law, limits.max_experts):
        optimum = _best_size(law, flops, expansion, granularity, vocab, limits)
        if optimum is not None:
            found.append(optimum)
    if not found:
        raise ValueError(
            f"no model of the law {law.name} keeps to the limits; raise --max-params or --max-experts, or choose another --law"
        )
    return sorted(found, key=lambda optimum: optimum.loss)


def _kinds(law: Law, max_experts: int | None) -> list[tuple[float, float]]:
    """Expansion rates and granularities to try."""
    expansions, granularities = law.expansions, law.granularities
    if not expansions:
        fitted = law.fitted.get("expansion")
        expansions = _powers_of_two(max_experts or (fitted.high if fitted else 1))
    if not granularities:
        granularities = _powers_of_two(_MOST_GRANULAR)
    return [(e, g) for e in expansions for g in granularities if max_experts is None or e * g <= max_experts]


def _powers_of_two(highest: float) -> tuple[float, ...]:
    return tuple(2.0**power for power in range(int(math.log2(highest)) + 1))


def _best_size(
    law: Law, flops: float, expansion: float, granularity: float, vocab: int, limits: Limits
) -> Optimum | None:
    if limits.active is not None:
        size = law.size(limits.active, expansion, granularity, vocab, with_embedding=True)
        return None if _too_large(size, limits) else _trained(law, size, flops)

    def at(log_blocks: float) -> ModelSize:
        blocks = math.exp(log_blocks)
        active_blocks = (4 + law.ffn) * (64 * blocks) ** 2 * blocks
        return law.size(active_blocks, expansion, granularity, vocab, with_embedding=False)

    low, high = _LOG_BLOCKS
    if _too_large(at(low), limits):
        return None
    if _too_large(at(high), limits):
        high = _last(lambda x: not _too_large(at(x), limits), low, high)
    best = _minimum(lambda x: law.loss(at(x), flops / FLOPS[law.flops](at(x))), low, high)
    return _trained(law, at(best), flops)


def _too_large(size: ModelSize, limits: Limits) -> bool:
    return limits.max_total is not None and size.total > limits.max_total


def _trained(law: Law, size: ModelSize, flops: float) -> Optimum:
    tokens = flops / FLOPS[law.flops](size)
    return Optimum(
        size=size,
        tokens=tokens,
        loss=law.loss(size, tokens),
        extrapolations=tuple(law.extrapolations(size, tokens)),
    )


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum is least, by golden sections; its ends included."""
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [function(x) for x in inner]
    while high - low > 1e-6:
        if values[0] <= values[1]:
            high, inner = inner[1], [inner[1] - _GOLDEN * (inner[1] - low), inner[0]]
            values = [function(inner[0]), values[0]]
        else:
            low, inner = inner[0], [inner[1], inner[0] + _GOLDEN * (high - inner[0])]
            values = [values[1], function(inner[1])]
    return (low + high) / 2


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number for which a condition still holds that fails from there on."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
