"""Upcycles a dense model's folder into an MoE's, layer by layer, and measures how far the two models are apart.

Memory is that of one layer's source and result. The result appears under its name when it is written, checked and described.
"""

import copy
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe.convert.dense import activation, check_dense, ffn_names, ffn_tensors
from moe.convert.layers import parse_layers
from moe.convert.model_card import CARD, ModelCard, render_card
from moe.convert.upcycle import UPCYCLERS, UpcycleOptions, Upcycler
from moe.convert.upcycle.btx import average, check_alike
from moe.convert.upcycle.weights import DTYPES, layer_weights
from moe.errors import nearest
from moe.layer import MoESpec
from moe.models.compare import LogitComparison, compare_folders
from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.modeling import MoEForCausalLM
from moe.models.stock import FORMATS
from moe.models.stock.write import Conversion, check_fits, write_model
from moe.models.verify import measure, text_windows

# Largest difference of a logit in fp32, times their root mean square where that is above 1, of methods that keep the function.
EXACT_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Upcycled:
    """What came out.

    Attributes:
        out: its folder.
        config: of the model, in our form.
        is_exact: whether the method keeps the function, so that a difference above `EXACT_LIMIT` would have been an error.
        comparison: with the (first) source in fp32; ``None`` where it was not asked for.
    """

    out: Path
    config: MoEConfig
    is_exact: bool
    comparison: LogitComparison | None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that is known before weights are read."""

    sources: list[ModelFolder]
    out: Path
    to: str
    method: Upcycler
    options: UpcycleOptions
    config: MoEConfig
    is_exact: bool


def upcycle(
    sources: Sequence[Path],
    out: Path,
    options: UpcycleOptions,
    *,
    to: str = "moe",
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Upcycled:
    """Write the folder ``out``.

    Args:
        sources: folders of dense models; methods but "btx" take one.
        out: the folder to make.
        options: the method and what it is told.
        to: a key of `FORMATS`.
        verify: compare logits with those of the first source; needs memory for either model in fp32.
        progress: called with layers written and in all.

    Raises:
        ValueError: ``out`` exists, or what is asked for is impossible for these sources; names the option.
        RuntimeError: the method keeps the function and yet logits differ.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    job = _prepare([ModelFolder(path) for path in sources], out, to, options)
    comparison: LogitComparison | None = None

    def complete(folder: Path) -> None:
        nonlocal comparison
        comparison = _compared(job, folder) if verify else None
        (folder / CARD).write_text(render_card(_card(job, comparison)), encoding="utf-8")

    write_model(_conversion(job), out, to, progress, dtype=DTYPES.get(options.dtype), check=complete)
    return Upcycled(out=out, config=job.config, is_exact=job.is_exact, comparison=comparison)


def _prepare(folders: list[ModelFolder], out: Path, to: str, options: UpcycleOptions) -> _Job:
    if options.method not in UPCYCLERS:
        raise ValueError(f"--method {options.method!r} is unknown; {nearest(options.method, UPCYCLERS)}")
    method, first = UPCYCLERS[options.method], folders[0]
    ffn_names(first.config)  # whether it is a dense decoder at all
    layers = parse_layers(options.layers, first.config.num_hidden_layers)
    for folder in folders:
        check_dense(folder, layers)
    width = first.config.intermediate_size
    method.check(options, width, len(folders))
    check_alike(folders)
    config = _config(first, options, layers)
    try:
        check_fits(config, to)
    except ValueError as problem:
        raise ValueError(f"{problem}{_other_score(first, options, layers, to)}") from None
    dtype = DTYPES.get(options.dtype) or first.read(ffn_tensors(first.config, layers[0])[-1]).dtype
    is_exact = options.renormalize and options.dtype != "bf16" and method.keeps_function(options, width, dtype)
    return _Job(sources=folders, out=out, to=to, method=method, options=options, config=config, is_exact=is_exact)


def _config(source: ModelFolder, options: UpcycleOptions, layers: tuple[int, ...]) -> MoEConfig:
    """The result's config, checked by building the model without memory."""
    router: dict[str, object] = {"name": "topk", "top_k": options.top_k}
    if options.score == "sigmoid":
        router |= {"score": "sigmoid", "selection_bias": True}
    if not options.renormalize:
        score = 0.5 if options.score == "sigmoid" else 1 / options.num_experts  # of every expert at logits of 0
        router |= {"renormalize": False, "route_scale": 1 / (options.top_k * score)}
    everywhere = len(layers) == source.config.num_hidden_layers
    spec = MoESpec(
        num_experts=options.num_experts,
        granularity=options.granularity,
        activation=activation(source.config),  # type: ignore[arg-type]
        num_shared_experts=options.num_shared,
        only_layers=None if everywhere else layers,
        router=router,
    )
    text_config = copy.deepcopy(source.config)
    if options.dtype in DTYPES:
        text_config.dtype = DTYPES[options.dtype]
    config = MoEConfig(text_config=text_config, moe=spec.to_dict(), dtype=text_config.dtype)
    with torch.device("meta"):
        MoEForCausalLM(config)
    return config


def _other_score(source: ModelFolder, options: UpcycleOptions, layers: tuple[int, ...], to: str) -> str:
    """Advice to choose the other score for the gates, where a format refuses less with it."""
    if to not in FORMATS:
        return ""
    other = replace(options, score="softmax" if options.score == "sigmoid" else "sigmoid")
    with_this, with_other = (FORMATS[to].refusals(_config(source, each, layers)) for each in (options, other))
    return f"; pass --score {other.score}" if set(with_other) < set(with_this) else ""


def _conversion(job: _Job) -> Conversion:
    first = job.sources[0]
    return Conversion(
        source=first,
        config=job.config,
        layer_weights=lambda layer: layer_weights(job.sources, layer, job.options),
        replaced=lambda layer, name: name in ffn_tensors(first.config, layer),
        read=(lambda name: average(job.sources, name)) if len(job.sources) > 1 else None,
    )


def _compared(job: _Job, folder: Path) -> LogitComparison:
    """Compare with the first source in fp32; what transformers alone must load runs in a process without us."""
    source = job.sources[0].path
    compare = compare_folders if job.to == "moe" else measure
    found = compare(source, folder, text_windows(source))
    if job.is_exact and not found.max_diff <= EXACT_LIMIT * max(1.0, found.reference_rms):
        raise RuntimeError(
            f"--method {job.method.name} keeps the model's function, but logits differ by {found.max_diff:.2e} (their root mean "
            f"square is {found.reference_rms:.2f}); this is a bug: please report it with the source's config.json"
        )
    return found


def _card(job: _Job, comparison: LogitComparison | None) -> ModelCard:
    first, *others = job.sources
    flags = job.options.flags(job.method.uses)
    words = [
        "moe",
        "upcycle",
        str(first.path),
        str(job.out),
        *(word for pair in flags.items() for word in pair if word),
    ]
    words += ["--to", job.to, *(word for other in others for word in ("--also", str(other.path)))]
    checks: dict[str, object] = {}
    if comparison is not None:
        checks = {
            "largest difference of a logit, in fp32": f"{comparison.max_diff:.2e}",
            "root mean square of the source's logits": f"{comparison.reference_rms:.2f}",
            "mean KL divergence per token, nats": f"{comparison.kl:.2e}",
            "tokens with the same most likely next token": f"{comparison.same_top1:.1%}",
            "tokens compared": comparison.tokens,
        }
    kept = "The method keeps the function: logits equal the source's but for rounding."
    changed = "The method changes the function; the model is meant to be trained further."
    return ModelCard(
        title=job.out.name,
        kind="upcycled",
        command=shlex.join(words),
        sources=job.sources,
        summary=job.method.summary,
        config=job.config,
        to=job.to,
        options={name.removeprefix("--"): value for name, value in flags.items()},
        checks=checks,
        notes=[kept if job.is_exact else changed],
    )
