"""Laws of one's own: finished runs in, a law that predicts and plans like the published ones out, and its file."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import nearest
from moe.scaling.laws.assess import FittedLaw, fit_law
from moe.scaling.laws.forms import FORMS, Trained
from moe.scaling.laws.law import Law, Range

# As the papers that the forms are from count N and FLOPs.
_COUNTED = {
    "chinchilla": ("active", "parameters"),
    "fine-grained": ("total_blocks", "routing"),
    "joint": ("active", "parameters"),
}
_KNOWS = {"chinchilla": (), "fine-grained": ("granularity",), "joint": ("expansion",)}


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished training.

    Attributes:
        name: for people.
        active: parameters that a token uses, embedding and head included.
        total_blocks: all parameters but embedding, head and routers.
        tokens: D.
        expansion: E, all experts of a layer over those that a token uses; 1 for a dense model.
        granularity: G, experts that a token uses; 1 for a dense model.
        loss: held-out, in nats per token.
    """

    name: str
    active: float
    total_blocks: float
    tokens: float
    expansion: float
    granularity: float
    loss: float


def read_runs_csv(path: Path) -> list[TrainedRun]:
    """Runs from a CSV file whose columns are the fields of `TrainedRun`.

    Raises:
        ValueError: a column is missing or a value is no positive number; names file, line and column.
    """
    columns = [column.name for column in dataclasses.fields(TrainedRun)]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(columns)}")
        found = []
        for row in reader:
            values: dict[str, Any] = {"name": row["name"]}
            for column in columns[1:]:
                try:
                    values[column] = float(row[column])
                except (TypeError, ValueError):
                    raise ValueError(f"{path} line {reader.line_num}: {column}={row[column]!r} is no number") from None
                if not 0 < values[column] < float("inf"):
                    raise ValueError(f"{path} line {reader.line_num}: {column}={row[column]} must be positive")
            found.append(TrainedRun(**values))
    return found


def as_trained(runs: Sequence[TrainedRun], form: str) -> Trained:
    """What the losses of runs depend on, with N as the form counts it."""
    return Trained(
        params=np.array([getattr(run, _COUNTED[form][0]) for run in runs], dtype=np.float64),
        tokens=np.array([run.tokens for run in runs], dtype=np.float64),
        expansion=np.array([run.expansion for run in runs], dtype=np.float64),
        granularity=np.array([run.granularity for run in runs], dtype=np.float64),
    )


@dataclass(frozen=True, kw_only=True)
class OwnLaw:
    """A law fitted to runs, with how well."""

    law: Law
    fitted: FittedLaw
    runs: tuple[TrainedRun, ...]


def fit_runs(
    runs: Sequence[TrainedRun], form: str, held: Mapping[str, float] | None = None, *, samples: int = 400, seed: int = 0
) -> OwnLaw:
    """Fit a form to runs.

    Args:
        runs: finished ones on the same data with the same tokenizer.
        form: a name in `FORMS`.
        held: constants that stay as given.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: an unknown form, too few runs, or runs that do not determine the parameters.
    """
    if form not in FORMS:
        raise ValueError(f"--form {form!r} is unknown; {nearest(form, FORMS)}")
    trained = as_trained(runs, form)
    fitted = fit_law(form, FORMS[form], trained, np.array([run.loss for run in runs]), held, samples=samples, seed=seed)
    unknown = [
        f"the runs have several values of {what}, which the form {form} does not know"
        for what in ("expansion", "granularity")
        if what not in _KNOWS[form] and len(np.unique(getattr(trained, what))) > 1
    ]
    fitted = dataclasses.replace(fitted, warnings=(*fitted.warnings, *unknown))
    return OwnLaw(law=_law(runs, form, fitted.constants, fitted.predicted), fitted=fitted, runs=tuple(runs))


def _law(runs: Sequence[TrainedRun], form: str, constants: Mapping[str, float], predicted: Sequence[float]) -> Law:
    counted, flops = _COUNTED[form]
    active = np.array([run.active for run in runs])
    tokens = np.array([run.tokens for run in runs])
    ranges = {
        "active": active,
        "tokens": tokens,
        "expansion": np.array([run.expansion for run in runs]),
        "granularity": np.array([run.granularity for run in runs]),
        "tokens per active parameter": tokens / active,
    }
    kinds = {key: np.unique(ranges[key]) for key in ("expansion", "granularity")}
    return Law(
        name="own",
        source=f"{len(runs)} runs",
        form=FORMS[form],
        constants=constants,
        counted=counted,
        flops=flops,
        ffn=9,
        expansions=tuple(kinds["expansion"].tolist()) if len(kinds["expansion"]) == 1 else (),
        granularities=tuple(kinds["granularity"].tolist()) if len(kinds["granularity"]) == 1 else (),
        fitted={key: Range(low=float(values.min()), high=float(values.max())) for key, values in ranges.items()},
        rmse=float(np.sqrt(np.mean([(run.loss - loss) ** 2 for run, loss in zip(runs, predicted, strict=True)]))),
    )


def as_dict(own: OwnLaw) -> dict[str, Any]:
    """Plain data that `law_from_dict` reads back."""
    return {
        "runs": [dataclasses.asdict(run) for run in own.runs],
        "formula": own.law.form.formula,
        "params_counted": own.law.counted,
        **dataclasses.asdict(own.fitted),
    }


def load_law(path: Path) -> Law:
    """The law of a file that `moe laws fit --out` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        runs = [TrainedRun(**run) for run in values["runs"]]
        return _law(runs, values["form"], values["constants"], values["predicted"])
    except (json.JSONDecodeError, KeyError, TypeError, OSError) as problem:
        raise ValueError(f"--law {path} is no file of `moe laws fit --out`: {problem}") from None
