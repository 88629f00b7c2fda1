"""``recovery``: held-out perplexity of converted models against tokens of recovery training, on a real model.

SmolLM2-135M is converted by each method so that three quarters of its FFN neurons run per token (carving: 8 experts, 2 shared
and 4 of 6 routed; ToMoE: 8 overlapping experts, one per token), and then trained with LoRA on the same batches of WikiText-2.
Row "dense" is the model as it was, trained alike: what the text alone brings. ToMoE is trained itself before
that: part ``masks`` has its perplexity against the steps of that training, at three quarters and at half of the neurons.
A seed decides the calibration text, the masks' start, the order of the text and LoRA's start.

``ppl_N`` is the perplexity after N steps, on held-out text of the same file, in windows of 512 tokens.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from benchmarks import pictures
from benchmarks.carve.benchmark import QUICK_VOCAB, tiny_model
from benchmarks.carve.cells import IN_DOMAIN, TEXT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.convert.carve import CARVERS
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import carve
from moe.convert.carve.types import CarveShape
from moe.convert.demo import write_demo
from moe.convert.recover import RecoverOptions, Recovery
from moe.convert.tomoe import ToMoEOptions
from moe.convert.tomoe.convert import write_experts
from moe.convert.tomoe.experts import ExpertPlan, plan_experts
from moe.convert.tomoe.training import MaskTraining, batches
from moe.models.calibration_text import choose_windows, read_text, split_text, tokenize
from moe.models.evaluate import cut_windows, perplexity
from moe.models.folder import ModelFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPE = CarveShape(num_experts=8, num_shared=2, top_k=4)
SHARES = (SHAPE.active_share, 0.5)  # of part `masks`; models of the first are recovered
SEEDS = (0, 1)
DENSE, TOMOE = "dense", "tomoe"
CARVED = ("cmoe", "best")
EXACT_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much text and training.

    Attributes:
        window: tokens in a window.
        calibration: tokens that carving sees.
        mask_points, points: steps of mask and of recovery training after which perplexities are taken; the last is the end.
        batch: windows of a recovery step; a step of mask training has one.
        mask_rate: learning rate of the masks: ten times the released one, for a hundredth of its steps.
        rate: peak learning rate of LoRA.
        eval_windows: of held-out text.
        width_multiple: of ToMoE's experts.
        bf16: autocast of the training.
    """

    window: int = 512
    calibration: int = 8192
    mask_points: tuple[int, ...] = (20, 40, 80)
    points: tuple[int, ...] = (0, 15, 30, 60)
    batch: int = 1
    mask_rate: float = 1e-2
    rate: float = 1e-3
    eval_windows: int = 8
    width_multiple: int = 32
    bf16: bool = True


FULL = Size()
QUICK = Size(
    window=32, calibration=256, mask_points=(4, 8), points=(0, 2, 4), eval_windows=2, width_multiple=4, bf16=False
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids: those to calibrate and train on, and windows (B, L) to evaluate on."""

    ids: list[int]
    windows_BL: Tensor
    held_out_BL: Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a method gets: the dense folder, a folder to make, text, size, seed, and ToMoE's trained experts."""

    dense: ModelFolder
    out: Path
    text: Text
    size: Size
    seed: int
    plan: ExpertPlan


def read_source(folder: Path, options: Options, size: Size) -> tuple[ModelFolder, Text]:
    """SmolLM2 and WikiText-2, or in quick mode a random model and random tokens."""
    if options.quick:
        dense = tiny_model(folder)
        train, held_out = (torch.randint(QUICK_VOCAB, (count,)).tolist() for count in (1024, 256))
    else:
        dense = write_demo(folder)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        train, held_out = (tokenize(tokenizer, part) for part in split_text(read_text(TEXT / IN_DOMAIN)))
    windows_BL = cut_windows(train, size.window, None)
    held_out_BL = cut_windows(held_out, size.window, size.eval_windows)
    return ModelFolder(dense), Text(ids=train, windows_BL=windows_BL, held_out_BL=held_out_BL)


def convert_dense(job: Job) -> None:
    """The dense model itself, as an MoE of one expert, so that it is trained by the same code."""
    config = job.dense.config
    num_layers, width = config.num_hidden_layers, config.intermediate_size
    plan = ExpertPlan(
        routed_LEW=torch.arange(width).expand(num_layers, 1, width),
        shared_LS=torch.zeros(num_layers, 0, dtype=torch.int64),
        router_LED=torch.zeros(num_layers, 1, config.hidden_size),
        num_neurons=width,
    )
    write_experts(job.dense, plan, job.out)


def convert_carved(method: str, job: Job) -> None:
    """By a carving method with its own gate."""
    generator = torch.Generator().manual_seed(job.seed)
    windows_BL = choose_windows([job.text.ids], job.size.calibration, job.size.window, generator)
    carve(job.dense, job.out, windows_BL, CarveOptions(shape=SHAPE, method=method, bf16=job.size.bf16, seed=job.seed))


def convert_tomoe(job: Job) -> None:
    """By the masks of part `masks`."""
    write_experts(job.dense, job.plan, job.out)


# Carving methods that `CARVERS` lacks are left out.
METHODS: dict[str, Callable[[Job], None]] = {
    DENSE: convert_dense,
    **{name: partial(convert_carved, name) for name in CARVED if name in CARVERS},
    TOMOE: convert_tomoe,
}


def train_masks(
    dense: ModelFolder, text: Text, size: Size, share: float, seed: int, options: Options
) -> tuple[Row, ExpertPlan]:
    """Train masks; the row of part `masks`, and the experts at the end."""
    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
    how = ToMoEOptions(
        active_share=share,
        steps=size.mask_points[-1],
        lr=size.mask_rate,
        width_multiple=size.width_multiple,
        bf16=size.bf16,
        seed=seed,
    )
    row: Row = {"part": "masks", "method": TOMOE, "seed": seed, "active_share": share}
    training, seconds = MaskTraining(model, how), 0.0
    for step, input_ids_BL in enumerate(batches(text.windows_BL, how), start=1):
        training.step(input_ids_BL)
        if step in size.mask_points:
            seconds += time.perf_counter() - start
            plan = plan_experts(training.result(), share, size.width_multiple)
            row[f"masks_ppl_{step}"] = masked_perplexity(training, plan, text.held_out_BL)
            options.report(f"masks {share:.0%}, seed {seed}, step {step}: perplexity {row[f'masks_ppl_{step}']}")
            start = time.perf_counter()
    row |= {"train_tokens": how.steps * size.window, "covered_share": round(plan.covered_share, 4)}
    return row | {"seconds": round(seconds, 1)}, plan


def masked_perplexity(training: MaskTraining, plan: ExpertPlan, windows_BL: Tensor) -> float:
    """Of the model with the masks of a plan and without noise: that which a conversion would give now."""
    gated, options = training.gated, training.options
    gated.set_noise(None)
    gated.set_masks(plan.masks())
    gated.on = True
    found = perplexity(gated.model, windows_BL)["perplexity"]
    gated.on = False
    gated.set_noise(options.temperature, training.generator)
    return round(found, 3)


def recover(job: Job, method: str, options: Options) -> Row:
    """Convert by a method, train, and take perplexities."""
    size, start = job.size, time.perf_counter()
    METHODS[method](job)
    seconds = time.perf_counter() - start
    model: Any = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
    points = size.points
    how = RecoverOptions(
        steps=points[-1],
        batch_size=size.batch,
        lr=size.rate,
        bf16=size.bf16,
        eval_every=math.gcd(*points),
        seed=job.seed,
    )
    start = time.perf_counter()
    found = Recovery(model, job.text.windows_BL, job.text.held_out_BL, how).run()
    row: Row = {"part": "run", "method": method, "seed": job.seed, "active_share": _share(method)}
    for step in points:
        row[f"ppl_{step}"] = round(math.exp(found[step].held_out or 0.0), 3)
    row |= {"train_tokens": found[-1].tokens, "convert_seconds": round(seconds, 1)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    options.report(f"{method}, seed {job.seed}: " + " ".join(f"{step}: {row[f'ppl_{step}']}" for step in points))
    return row


def _share(method: str) -> float:
    return 1.0 if method == DENSE else SHARES[0]


def run(options: Options) -> list[Row]:
    """One row per training of masks, one per recovery, then one per method with means over seeds."""
    hf_logging.disable_progress_bar()
    size = QUICK if options.quick else FULL
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dense, text = read_source(root / "dense", options, size)
        for seed in SEEDS:
            plans = {}
            for share in SHARES:
                row, plans[share] = train_masks(dense, text, size, share, seed, options)
                rows.append(row)
            for method in METHODS:
                out = root / f"{method}-{seed}"
                job = Job(dense=dense, out=out, text=text, size=size, seed=seed, plan=plans[SHARES[0]])
                rows.append(recover(job, method, options))
                shutil.rmtree(out)  # half a gigabyte each
    for method in METHODS:
        rows.append(_mean([row for row in rows if (row["part"], row["method"]) == ("run", method)], size))
    page = draw(rows, size)
    if not options.quick:
        options.report(f"drew {pictures.save(page, 'recovery')}")
    return rows


def _mean(runs: list[Row], size: Size) -> Row:
    row: Row = {"part": "mean", "method": runs[0]["method"], "active_share": runs[0]["active_share"]}
    for step in size.points:
        row[f"ppl_{step}"] = round(statistics.fmean(float(str(run[f"ppl_{step}"])) for run in runs), 3)
    last = [float(str(run[f"ppl_{size.points[-1]}"])) for run in runs]
    return row | {"spread": round(statistics.stdev(last), 3), "train_tokens": runs[0]["train_tokens"]}


def gate(options: Options) -> list[Check]:
    """On a tiny model: one expert of all neurons is the dense model; masks are the experts that they become; LoRA merges."""
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dense, text = read_source(root / "dense", replace(options, quick=True), QUICK)
        model: Any = AutoModelForCausalLM.from_pretrained(dense.path).eval()
        ids_BL = text.held_out_BL
        with torch.no_grad():
            plain = model(input_ids=ids_BL).logits
            training = MaskTraining(model, ToMoEOptions(num_experts=4, width_multiple=4))
            plan = plan_experts(training.result(), 0.5, 4)
            job = Job(dense=dense, out=root / "one", text=text, size=QUICK, seed=0, plan=plan)
            convert_dense(job)
            convert_tomoe(replace(job, out=root / "masked"))
            one, masked = (AutoModelForCausalLM.from_pretrained(root / name).eval() for name in ("one", "masked"))
            training.gated.set_noise(None)
            training.gated.set_masks(plan.masks())
            gated = training.gated.logits(ids_BL, on=True)
            found = [
                ("dense model as one expert: logits", one(input_ids=ids_BL).logits - plain),
                ("masks as experts: logits", masked(input_ids=ids_BL).logits - gated),
            ]
        how = RecoverOptions(steps=2, batch_size=2, lr=1e-2)
        recovery = Recovery(masked, text.windows_BL, ids_BL, how)
        last = recovery.run()[-1].held_out
        assert last is not None
        checks = [Check(name=name, error=error.abs().max().item(), limit=EXACT_LIMIT) for name, error in found]
        checks.append(
            Check(name="LoRA merged: held-out loss", error=abs(recovery.evaluate() - last), limit=EXACT_LIMIT)
        )
    return checks


def draw(rows: list[Row], size: Size = FULL) -> "Figure":
    """Perplexity against tokens of recovery, and of masks against tokens of their own training."""
    from moe.train.picture_style import LIGHT

    page, (left, right) = pictures.figure(5.2, columns=2)
    tokens = [step * size.batch * size.window / 1e3 for step in size.points]
    for index, method in enumerate(METHODS):
        color = LIGHT.text if method == DENSE else f"C{index}"
        for row in rows:
            if row["method"] == method and row["part"] in ("run", "mean"):
                is_mean = row["part"] == "mean"
                values = [float(str(row[f"ppl_{step}"])) for step in size.points]
                line, width = ("-" if is_mean else ":"), (1.8 if is_mean else 1.0)
                left.plot(tokens, values, line, color=color, linewidth=width, label=method if is_mean else None)
    pictures.style(left, "Held-out perplexity", "thousand tokens of recovery; dotted: seeds")
    left.legend(frameon=False, fontsize=8)
    tokens = [step * size.window / 1e3 for step in size.mask_points]
    for index, share in enumerate(SHARES):
        for row in rows:
            if row["part"] == "masks" and row["active_share"] == share:
                values = [float(str(row[f"masks_ppl_{step}"])) for step in size.mask_points]
                label = f"{share:.0%} of the neurons" if row["seed"] == SEEDS[0] else None
                right.plot(tokens, values, "-o", color=f"C{index}", markersize=3.5, linewidth=1.4, label=label)
    right.set_yscale("log")
    pictures.style(right, "ToMoE: masks before recovery", "thousand tokens that the masks were trained on")
    right.legend(frameon=False, fontsize=8)
    return page


BENCHMARK = Benchmark(
    name="recovery",
    description="held-out perplexity against recovery tokens of a real model carved by cmoe, best and ToMoE, 2 seeds",
    columns=(
        *("part", "method", "seed", "active_share", *(f"ppl_{step}" for step in FULL.points), "spread"),
        *(f"masks_ppl_{step}" for step in FULL.mask_points),
        *("covered_share", "train_tokens", "convert_seconds", "seconds"),
    ),
    table=(
        *("method", "seed", "active_share", *(f"ppl_{step}" for step in FULL.points), "spread"),
        *(f"masks_ppl_{step}" for step in FULL.mask_points),
        *("covered_share", "train_tokens", "convert_seconds", "seconds"),
    ),
    gate=gate,
    run=run,
)
