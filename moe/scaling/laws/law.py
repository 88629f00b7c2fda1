"""A scaling law: a form with its constants, what it calls N, what it calls FLOPs, and where it was fitted."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moe.scaling.laws.forms import Form, Trained
from moe.scaling.laws.size import ModelSize, sized_by_active

# Parameter counts that laws are written in.
COUNTS: dict[str, Callable[[ModelSize], float]] = {
    "active": lambda size: size.active,
    "active_blocks": lambda size: size.active_blocks,
    "total_blocks": lambda size: size.total_blocks,
}


def flops_of_parameters(size: ModelSize) -> float:
    """Training FLOPs a token: 6 for each active parameter, embedding and head included (arXiv 2502.05172 appendix A.2)."""
    return 6 * size.active


def flops_with_routing(size: ModelSize, per_parameter: float = 6, per_routing: float = 14) -> float:
    """Training FLOPs a token: (12 d^2 c_f + d E G c_r) n, without embedding and head (arXiv 2402.07871 eq. 10).

    Args:
        size: the model.
        per_parameter: c_f.
        per_routing: c_r, between 6 and 20 by the paper's appendix E, which takes 14.
    """
    return per_parameter * size.active_blocks + per_routing * size.routing


FLOPS: dict[str, Callable[[ModelSize], float]] = {"parameters": flops_of_parameters, "routing": flops_with_routing}


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest and largest value that a law was fitted on."""

    low: float
    high: float

    def outside(self, name: str, value: float) -> str | None:
        """A sentence, where ``value`` is not inside."""
        if value > self.high * (1 + 1e-6):
            return f"{name} {value:.3g} is {value / self.high:.3g} times the largest fitted ({self.high:.3g})"
        if value < self.low * (1 - 1e-6):
            return f"{name} {value:.3g} is {self.low / value:.3g} times below the smallest fitted ({self.low:.3g})"
        return None


@dataclass(frozen=True, kw_only=True)
class Law:
    """A scaling law with its constants.

    Attributes:
        name: as in `LAWS`.
        source: where the constants are from.
        form: the function.
        constants: of the form.
        counted: N of the form, one of `COUNTS`.
        flops: cost of training, one of `FLOPS`.
        ffn: f of the models it was fitted on, see `moe.scaling.laws.size`.
        expansions: expansion rates that it holds for; empty: any.
        granularities: the same of granularities.
        fitted: ranges by "tokens", "expansion", "granularity", "tokens per active parameter", "FLOPs" and "active" or
            "active_blocks".
        rmse: root mean square of its residuals in nats, as the source states it; None where it does not.
    """

    name: str
    source: str
    form: Form
    constants: Mapping[str, float]
    counted: str
    flops: str
    ffn: float
    expansions: tuple[float, ...] = ()
    granularities: tuple[float, ...] = ()
    fitted: Mapping[str, Range] = field(default_factory=dict)
    rmse: float | None = None

    def size(self, active: float, expansion: float, granularity: float, vocab: int, with_embedding: bool) -> ModelSize:
        """The law's model of ``active`` parameters a token, of the papers' shape.

        Raises:
            ValueError: the law does not hold for such models.
        """
        self.check(expansion, granularity)
        return sized_by_active(
            active,
            expansion=expansion,
            granularity=granularity,
            ffn=self.ffn,
            vocab=vocab,
            with_embedding=with_embedding,
        )

    def check(self, expansion: float, granularity: float) -> None:
        """Raise a ValueError where the law says nothing about this kind of model."""
        if expansion < 1 or granularity < 1:
            raise ValueError(
                f"expansion rate {expansion:g} and granularity {granularity:g} must be at least 1, which is the dense model"
            )
        for name, asked, known in (
            ("expansion rate", expansion, self.expansions),
            ("granularity", granularity, self.granularities),
        ):
            if known and asked not in known:
                held = " or ".join(f"{value:g}" for value in known)
                raise ValueError(f"the law {self.name} is of {name} {held}, and {asked:g} was asked for")

    def loss(self, size: ModelSize, tokens: float) -> float:
        """Predicted loss in nats per token after ``tokens`` tokens."""
        trained = Trained(
            params=np.array([COUNTS[self.counted](size)]),
            tokens=np.array([tokens]),
            expansion=np.array([size.expansion]),
            granularity=np.array([size.granularity]),
        )
        return float(self.form.loss(self.constants, trained)[0])

    def training_flops(self, size: ModelSize, tokens: float) -> float:
        """FLOPs of a training."""
        return FLOPS[self.flops](size) * tokens

    def extrapolations(self, size: ModelSize, tokens: float) -> list[str]:
        """Sentences about what lies outside the range of the runs that the law was fitted on."""
        values = {
            "active": size.active,
            "active_blocks": size.active_blocks,
            "tokens": tokens,
            "expansion": size.expansion,
            "granularity": size.granularity,
            "tokens per active parameter": tokens
            / (size.active_blocks if "active_blocks" in self.fitted else size.active),
            "FLOPs": self.training_flops(size, tokens),
        }
        assert self.fitted.keys() <= values.keys(), f"unknown ranges {self.fitted.keys() - values.keys()}"
        names = {"active": "active parameters", "active_blocks": "active parameters without embeddings"}
        found = [limits.outside(names.get(key, key), values[key]) for key, limits in self.fitted.items()]
        return [sentence for sentence in found if sentence is not None]

    def __post_init__(self) -> None:
        assert self.constants.keys() == set(self.form.parameters), "constants are not those of the form"
        assert self.counted in COUNTS and self.flops in FLOPS
        assert all(math.isfinite(value) for value in self.constants.values())
