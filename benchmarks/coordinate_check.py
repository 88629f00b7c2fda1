"""``coordinate-check``: sizes of every module's output and of its change, over widths, numbers of experts and granularities.

The recipe is `configs/tiny-mup.yaml`, under muP and under the standard parametrization, which must fail over widths. Part
``width`` goes from 128 to 1,024; the picture shows it.
"""

from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.scaling.mup import Factors, width_factors
from moe.train.config import RunConfig, load_config
from moe.train.data import build_data
from moe.train.model import build_config, build_model
from moe.train.mup.check import LIMIT, CheckOptions, CheckResult, run_check
from moe.train.mup.render import draw_check

PICTURE = Path(__file__).parent / "results" / "coordinate-check.png"
RECIPE = ROOT / "configs" / "tiny-mup.yaml"
# The balance loss adds a gradient to the router whose share depends on how far training is: looked at by itself.
SETTINGS = [
    "data.seq_len=64",
    "moe.balance.aux_coef=0",
    "optim.lr=1e-3",
    "train.batch_size=4",
    "train.micro_batch_size=4",
]
VALUES = {"width": (128, 256, 512, 1024), "experts": (4, 8, 16, 32, 64), "granularity": (1, 2, 4, 8)}
# A dense FFN is a whole number of experts at every granularity, and one expert runs at the first.
BY_PART = {
    "width": [],
    "experts": [],
    "granularity": [
        "moe.granularity=1",
        "moe.num_experts=8",
        "moe.num_shared_experts=0",
        "moe.router={name: topk, top_k: 2}",
    ],
}


def _config(name: str, part: str) -> RunConfig:
    settings = [*SETTINGS, *BY_PART[part]]
    if name == "standard":
        settings.append("parametrization={name: standard}")
    return load_config(RECIPE, settings)


def gate(options: Options) -> list[Check]:
    """At the base itself the two are one model."""
    config = _config("mup", "width")
    data = build_data(config.data)
    model = build_model(config, build_config(config, data.tokenizer))
    other = build_model(_config("standard", "width"), build_config(_config("standard", "width"), data.tokenizer))
    apart = max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))
    factors = set(width_factors(model).values())
    return [
        Check(name="initial values at the base, muP less standard", error=apart, limit=0.0),
        Check(name="factors other than 1 at the base", error=float(len(factors - {Factors()})), limit=0.0),
    ]


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    drawn: list[CheckResult] = []
    for part, values in VALUES.items():
        if options.part not in (None, part):
            continue
        for name in ("mup", "standard") if part == "width" else ("mup",):
            asked = CheckOptions(
                axis=part,
                values=values[:2] if options.quick else values,
                num_steps=2 if options.quick else 10,
                num_seeds=1 if options.quick else 4,
            )
            result = run_check(
                _config(name, part),
                asked,
                lambda done, total, what=f"{part}, {name}": options.report(f"{what}: {done} of {total}"),
            )
            drawn += [result] if part == "width" else []
            rows += _rows(result, part)
    if drawn and not options.quick:
        draw_check(drawn, PICTURE)
    return rows


def _rows(result: CheckResult, part: str) -> list[Row]:
    """Every size after the last step, and one row that counts those judged at any step."""
    rows: list[Row] = []
    for verdict in result.verdicts:
        if verdict.step == result.options.num_steps:
            sizes = {f"size_{index}": round(size, 5) for index, size in enumerate(verdict.sizes.values())}
            rows.append(
                {
                    "part": part,
                    "parametrization": result.parametrization,
                    "module": verdict.module,
                    "quantity": verdict.quantity,
                    "step": verdict.step,
                    "change": round(verdict.change, 3),
                    "ok": "" if not verdict.judged else int(verdict.change <= LIMIT),
                    **sizes,
                }
            )
    judged = [verdict for verdict in result.verdicts if verdict.judged]
    rows.append(
        {
            "part": part,
            "parametrization": result.parametrization,
            "module": "all",
            "quantity": f"all steps, {part} {min(result.options.values)} to {max(result.options.values)}",
            "change": round(max(verdict.change for verdict in judged), 3),
            "judged": len(judged),
            "ok": len(judged) - len(result.failed),
        }
    )
    return rows


BENCHMARK = Benchmark(
    name="coordinate-check",
    description="sizes of activations and updates over widths 128 to 1024, experts 4 to 64, granularity 1 to 8: muP and standard",
    columns=(
        "part",
        "parametrization",
        "module",
        "quantity",
        "step",
        *(f"size_{index}" for index in range(5)),
        "change",
        "judged",
        "ok",
    ),
    table=(
        "part",
        "parametrization",
        "module",
        "quantity",
        *(f"size_{index}" for index in range(5)),
        "change",
        "judged",
        "ok",
    ),
    gate=gate,
    run=run,
    parts=tuple(VALUES),
)
