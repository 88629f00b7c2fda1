"""The coordinate check of a recipe: real text, a few optimizer steps of each variant, sizes of every module's output."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe.scaling.coordinates import Sizes, Verdict, measure_sizes, output_modules, verdicts
from moe.train.config import RunConfig
from moe.train.data import BatchLoader, DataBundle, build_data
from moe.train.model import build_config, build_model
from moe.train.mup.variants import check_values, variant
from moe.train.optim import choose_optimizer, param_groups

LIMIT = 0.2


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What to compare.

    Attributes:
        axis: key of `AXES`.
        values: places on it.
        num_steps: optimizer steps; sizes are judged after the first, half of them, and the last.
        num_seeds: initialisations (and batches) that sizes are averaged over.
        num_windows: windows of text in a batch.
        lr: learning rate, constant; the recipe's where it is None.
    """

    axis: str
    values: tuple[int, ...]
    num_steps: int = 10
    num_seeds: int = 3
    num_windows: int = 4
    lr: float | None = None

    def __post_init__(self) -> None:
        check_values(self.axis, self.values, at_least=2)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Sizes and what they say."""

    options: CheckOptions
    parametrization: str
    runs: dict[int, list[Sizes]] = field(repr=False)
    verdicts: list[Verdict]

    @property
    def failed(self) -> list[Verdict]:
        """Sizes that change by more than `LIMIT` over the values."""
        return [verdict for verdict in self.verdicts if verdict.judged and not verdict.change <= LIMIT]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parametrization": self.parametrization,
            "axis": self.options.axis,
            "values": list(self.options.values),
            "limit": LIMIT,
            "ok": not self.failed,
            "modules": [
                {
                    "module": each.module,
                    "quantity": each.quantity,
                    "step": each.step,
                    "sizes": {str(value): _number(size) for value, size in each.sizes.items()},
                    "change": _number(each.change),
                    "judged": each.judged,
                }
                for each in self.verdicts
            ],
        }


def _number(value: float) -> float | None:
    """JSON has none for what diverged."""
    return value if math.isfinite(value) else None


def run_check(
    config: RunConfig, options: CheckOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckResult:
    """Measure all variants on this machine's CPU, in fp32, one after the other."""
    data = build_data(config.data)
    runs: dict[int, list[Sizes]] = {}
    outputs: list[str] = []
    total = len(options.values) * options.num_seeds
    for value in sorted(set(options.values)):
        for seed in range(options.num_seeds):
            chosen = variant(config, options.axis, value).model_copy(update={"seed": config.seed + seed})
            sizes, outputs = _measure(chosen, data, options, seed)
            runs.setdefault(value, []).append(sizes)
            progress(sum(map(len, runs.values())), total)
    steps = sorted({1, max(options.num_steps // 2, 1), options.num_steps})
    return CheckResult(
        options=options,
        parametrization=config.parametrization.name,
        runs=runs,
        verdicts=verdicts(runs, [0, *steps], outputs),
    )


def _measure(config: RunConfig, data: DataBundle, options: CheckOptions, seed: int) -> tuple[Sizes, list[str]]:
    model = build_model(config, build_config(config, data.tokenizer))
    loader = BatchLoader(data.train, options.num_windows, 0, 1)
    for _ in range(seed + 1):  # another batch for each seed, the same for each variant
        (batch,) = loader.next_step()
    named = dict(model.named_parameters())
    lr = options.lr or config.optim.lr
    groups = [
        {**group, "params": [named[name] for name in group["params"]], "lr": lr * group["lr_scale"]}
        for group in param_groups(model, config.optim)
        if group["params"]
    ]
    chosen = choose_optimizer(config.optim)
    optimizer = chosen.optimizer_class(groups, **chosen.options)  # type: ignore[call-arg]

    def train_step() -> None:
        model(input_ids=batch.input_ids_BL, labels=batch.labels_BL, shift_labels=batch.labels_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return measure_sizes(model, batch.input_ids_BL, train_step, options.num_steps), output_modules(model)
