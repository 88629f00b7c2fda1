"""``routers``: every router of the registry in four parts, each a question of its own.

- ``text``: a small language model on real text at equal active parameters: loss, balance, compute, speed.
- ``clusters``: which gates find the clusters of a problem that no single network can learn?
- ``multitask``: which gates find the experts that a task is made of?
- ``tabular``: MLP, softmax MoE and GG MoE on small real tables.

`settings` has the options of every router in one table. Each part chooses learning rates in the way its module says,
on seeds that it does not report, with the same grid for all routers.
"""

import importlib
from types import ModuleType

from benchmarks.spec import Benchmark, Check, Options, Row

PARTS = ("text", "clusters", "multitask", "tabular")


def _module(name: str) -> ModuleType:
    """Imported when asked for: a worker process of one part needs no other."""
    return importlib.import_module(f"benchmarks.routers.{name}")


def _chosen(options: Options) -> list[str]:
    return [part for part in PARTS if options.part in (None, part)]


def gate(options: Options) -> list[Check]:
    """The checks of every part that runs."""
    return [check for part in _chosen(options) for check in _module(part).gate(options)]


def run(options: Options, keys: tuple[str, ...] | None = None) -> list[Row]:
    """The rows of every part, and a picture of each; ``keys`` limits the routers (by their labels)."""
    rows: list[Row] = []
    for part in _chosen(options):
        found = _module(part).run(options, keys)
        if not options.quick:
            _module("pictures").draw(part, found)
        rows += found
    return rows


COLUMNS = (
    "part",
    "case",
    "router",
    "model",
    "experts",
    "lr",
    "loss",
    "loss_spread",
    "accuracy",
    "accuracy_spread",
    "cluster_entropy",
    "f1",
    "f1_spread",
    "exact",
    "support",
    "metric",
    "score",
    "score_spread",
    "gain",
    "gain_spread",
    "max_violation",
    "entropy",
    "used",
    "ffn_flops",
    "active_params",
    "total_params",
    "tokens_per_s",
    "step_ms",
    "waiting",
    "values",
    "note",
)
HIDDEN = ("part", "active_params", "step_ms", "waiting", "values")  # in the CSV only

BENCHMARK = Benchmark(
    name="routers",
    description="every router: on text, on clustered data, on tasks with known experts; GG MoE on tables",
    parts=PARTS,
    columns=COLUMNS,
    table=tuple(column for column in COLUMNS if column not in HIDDEN),
    gate=gate,
    run=run,
)
