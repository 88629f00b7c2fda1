"""``upcycle``: held-out loss against tokens of models that were upcycled in different ways from one dense model.

A small dense Llama is trained on the text of Python's standard library. Each method makes an MoE of its checkpoint through
`moe.convert`, and all are trained further on the same unseen text: same batches, AdamW, a schedule that starts anew
(arXiv 2410.07524 found that it must), one learning rate for all. Baselines: the dense model trained on, and the same MoE from
random weights, which gets the tokens of the second phase alone. All MoEs have the same number of parameters in their experts, and
twice the dense model's FFN active per token: a token costs them more than the dense baseline.

A seed decides the gates, the redrawn neurons and which part of the text is trained on. ``step0_diff`` is the largest difference
of a logit to the dense model before training, in fp32; ``loss_N`` is the held-out loss in nats per token after N steps.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks import pictures
from benchmarks.routers.protocol import mean, run_all, spread
from benchmarks.routers.text import TEXT_BATCH, Trainer, held_out_loss, quick_data
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle
from moe.models import MoEForCausalLM
from moe.train.data import Batch, DataBundle, DataConfig, TokenizerConfig, build_data
from moe.train.data.loader import make_batch
from moe.train.model import parameter_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE, SCRATCH = "dense, trained on", "MoE from scratch"
COPY: dict[str, Any] = {"num_experts": 8, "top_k": 2}
METHODS: dict[str, dict[str, Any]] = {
    "copy": COPY,
    "drop 0.25": COPY | {"method": "drop", "ratio": 0.25},
    "drop 0.5": COPY | {"method": "drop", "ratio": 0.5},
    "drop 0.75": COPY | {"method": "drop", "ratio": 0.75},
    "noise": COPY | {"method": "noise"},
    # Halves of the FFN: the same parameters, and the same of them active.
    "virtual group": {"method": "virtual-group", "num_experts": 16, "top_k": 4, "granularity": 2},
}
EXACT = {"copy": COPY, "virtual group": METHODS["virtual group"], "drop 0": COPY | {"method": "drop", "ratio": 0.0}}
SEEDS = (0, 1)
POINTS = (0, 25, 50, 100, 200, 400)  # steps after which the held-out loss is taken
EXACT_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the dense model, its training and the further one."""

    dim: int = 96
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    vocab: int = 1024
    length: int = 128
    rate: float = 4e-3
    dense_steps: int = 1000
    points: tuple[int, ...] = POINTS
    eval_windows: int = 128


FULL = Size()
QUICK = Size(
    dim=16, hidden=8, layers=2, heads=2, vocab=300, length=16, dense_steps=3, points=(0, 2, 4), eval_windows=16
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the second phase; ``dense`` is the folder of the checkpoint."""

    method: str
    seed: int
    size: Size
    data: DataConfig
    dense: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run found; ``losses`` are those after ``size.points`` steps."""

    job: Job
    step0_diff: float | None
    losses: list[float]
    counts: dict[str, int]


def make_dense(size: Size) -> LlamaForCausalLM:
    """From the global generator."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.dim,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batch_at(bundle: DataBundle, step: int) -> Batch:
    """Training batch number ``step`` of the corpus."""
    return make_batch(bundle.train.rank_samples(step * TEXT_BATCH, TEXT_BATCH, 0, 1), False)


def train_dense(size: Size, data: DataConfig, folder: Path, options: Options) -> None:
    """The first phase: the checkpoint that all methods begin with."""
    bundle = build_data(data)
    torch.manual_seed(0)
    trainer = Trainer(make_dense(size), size.rate, size.dense_steps)
    for step in range(size.dense_steps):
        trainer.train_on(batch_at(bundle, step))
        if (step + 1) % 100 == 0:
            options.report(f"dense model: {step + 1} of {size.dense_steps} steps")
    options.report(f"dense model: held-out loss {held_out_loss(trainer.model, bundle, size.eval_windows):.4f}")
    trainer.model.save_pretrained(folder)  # type: ignore[operator]


def start(job: Job, folder: Path) -> tuple[Any, float | None]:
    """The model that the second phase begins with, and how far its logits are from the dense model's."""
    if job.method == DENSE:
        return AutoModelForCausalLM.from_pretrained(job.dense), 0.0
    options = UpcycleOptions(**METHODS.get(job.method, COPY), seed=job.seed)
    done = upcycle([Path(job.dense)], folder / "moe", options)
    if job.method == SCRATCH:
        torch.manual_seed(job.seed)
        return MoEForCausalLM(done.config), None
    assert done.comparison is not None
    return MoEForCausalLM.from_pretrained(folder / "moe"), done.comparison.max_diff


def train_further(job: Job) -> Trained:
    """The second phase of one method, on text that the dense model has not seen."""
    hf_logging.disable_progress_bar()
    size, bundle = job.size, build_data(job.data)
    steps = size.points[-1]
    with tempfile.TemporaryDirectory() as folder:
        model, step0_diff = start(job, Path(folder))
    counts = parameter_counts(model)
    trainer = Trainer(model, size.rate, steps)
    losses = []
    for step in range(steps + 1):
        if step in size.points:
            losses.append(held_out_loss(model, bundle, size.eval_windows))
            model.train()
        if step < steps:
            trainer.train_on(batch_at(bundle, size.dense_steps + job.seed * steps + step))
    return Trained(job=job, step0_diff=step0_diff, losses=losses, counts=counts)


def run(options: Options) -> list[Row]:
    """One row per run, then one per method with means over seeds."""
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(source="stdlib", seq_len=size.length, tokenizer=TokenizerConfig(vocab_size=size.vocab))
        if options.quick:
            data = quick_data(Path(folder))
        dense = Path(folder) / "dense"
        train_dense(size, data, dense, options)
        jobs = [
            Job(method=method, seed=seed, size=size, data=data, dense=str(dense))
            for seed in SEEDS
            for method in (DENSE, SCRATCH, *METHODS)
        ]
        found = run_all(train_further, jobs, options, _describe)
    rows = [_row("run", [trained]) | {"seed": trained.job.seed} for trained in found]
    for method in (DENSE, SCRATCH, *METHODS):
        rows.append(_row("mean", [trained for trained in found if trained.job.method == method]))
    page = figure(rows, size)
    if not options.quick:
        options.report(f"drew {pictures.save(page, 'upcycle')}")
    return rows


def _describe(trained: Trained) -> str:
    losses = " ".join(f"{loss:.4f}" for loss in trained.losses)
    return f"{trained.job.method}, seed {trained.job.seed}: {losses}"


def _row(part: str, runs: list[Trained]) -> Row:
    """Means over runs of one method; ``spread`` is the deviation of the last loss over seeds."""
    first = runs[0]
    row: Row = {"part": part, "method": first.job.method}
    row |= {name: first.counts[name] for name in ("active_params", "total_params")}
    differences = [run.step0_diff for run in runs if run.step0_diff is not None]
    if differences:
        row["step0_diff"] = float(f"{max(differences):.2e}")
    for index, point in enumerate(first.job.size.points):
        row[f"loss_{point}"] = mean([run.losses[index] for run in runs])
    row["spread"] = spread([run.losses[-1] for run in runs])
    row["tokens"] = first.job.size.points[-1] * TEXT_BATCH * first.job.size.length
    return row


def gate(options: Options) -> list[Check]:
    """What keeps the function by its definition does: logits of an upcycled model, written and loaded, are the dense model's."""
    hf_logging.disable_progress_bar()
    torch.manual_seed(0)
    model = make_dense(QUICK if options.quick else FULL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/dense")
        for method, values in EXACT.items():
            done = upcycle([Path(folder) / "dense"], Path(folder) / method, UpcycleOptions(**values))
            assert done.comparison is not None
            checks.append(
                Check(name=f"{method}: logits before training", error=done.comparison.max_diff, limit=EXACT_LIMIT)
            )
    return checks


def figure(rows: list[Row], size: Size = FULL) -> "Figure":
    """Loss against tokens, and the last loss against that of the dense model trained on."""
    from moe.train.picture_style import LIGHT

    page, (left, right) = pictures.figure(5.2, columns=2)
    means = {str(row["method"]): row for row in rows if row["part"] == "mean"}
    last = f"loss_{size.points[-1]}"
    dense = float(str(means[DENSE][last]))
    for index, (method, row) in enumerate(means.items()):
        color = LIGHT.text if method == DENSE else f"C{index}"
        # A model from scratch begins far above the others, which would all lie on one line then.
        shown = [point for point in size.points if method != SCRATCH or point >= size.points[-2]]
        tokens = [point * TEXT_BATCH * size.length / 1e6 for point in shown]
        losses = [float(str(row[f"loss_{point}"])) for point in shown]
        line = "--" if method in (DENSE, SCRATCH) else "-"
        left.plot(tokens, losses, line, color=color, label=method, linewidth=1.4)
        right.barh(index, float(str(row[last])) - dense, color=color, height=0.6)
        seeds = [
            float(str(single[last])) - dense for single in rows if (single["part"], single["method"]) == ("run", method)
        ]
        right.plot(seeds, [index] * len(seeds), "o", color=LIGHT.text, markersize=3.5)
    pictures.style(left, "Held-out loss, nats per token", "million tokens after upcycling; means of two seeds")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(means)), list(means))
    right.invert_yaxis()
    pictures.style(right, "At the end, against the dense model", "difference of held-out loss; dots are seeds")
    return page


BENCHMARK = Benchmark(
    name="upcycle",
    description="held-out loss against tokens of upcycled models, by method, 2 seeds",
    columns=(
        "part",
        "method",
        "seed",
        "step0_diff",
        *(f"loss_{point}" for point in POINTS),
        "spread",
        "tokens",
        "active_params",
        "total_params",
    ),
    table=("method", "step0_diff", *(f"loss_{point}" for point in POINTS), "spread", "active_params", "total_params"),
    gate=gate,
    run=run,
    parts=(),
)
