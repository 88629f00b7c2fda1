"""``moe plan``: from a run's config to what the planner needs, and its results as tables, JSON and settings to paste.

Everything shown here is predicted, and says so; the assumptions are shown with it.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from moe.errors import nearest
from moe.layer import MoESpec
from moe.models import MoEConfig
from moe.scaling.hardware import HARDWARE, Hardware
from moe.scaling.planner import Candidate, Planner, Search, overrides
from moe.scaling.replay import Replay, replay
from moe.scaling.shape import Layout, ModelShape, decoder_config
from moe.scaling.trace import RoutingTrace, load_trace, synthetic_trace
from moe.train.config import RunConfig
from moe.train.formats import compact
from moe.train.optim import param_groups

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_REPLAY_DEGREES = 8  # at most, of a trace


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is asked of ``moe plan`` besides the config; names are those of its options."""

    gpus: int
    hardware: str = "h100"
    memory: str | None = None
    interconnect: str | None = None
    gpus_per_node: int = 8
    ep: str | None = None
    zero: str | None = None
    micro_batch: str | None = None
    assume: tuple[str, ...] = ()


def make_planner(config: RunConfig, options: PlanOptions, console: Console) -> Planner:
    """The planner of a run.

    Raises:
        ValueError: an option or a part of the config cannot be planned.
    """
    parallel = config.parallel
    for name, value, known in (
        ("sp_size", parallel.sp_size, 1),
        ("offload_optimizer", parallel.offload_optimizer, "none"),
        ("offload_parameters", parallel.offload_parameters, "none"),
    ):
        if value != known:
            raise ValueError(f"parallel.{name}={value} cannot be planned; add parallel.{name}={known}")
    base = Layout(
        world_size=options.gpus,
        precision=config.train.precision,
        gpus_per_node=min(options.gpus_per_node, options.gpus),
        zero=parallel.deepspeed.get("zero_optimization", {}),
        exchange=parallel.exchange,
    )

    def groups(model: nn.Module) -> list[list[str]]:
        return [group["params"] for group in param_groups(model, config.optim)]

    return Planner(
        model_shape(config),
        chosen_hardware(options),
        base,
        config.train.batch_size,
        groups,
        lambda line: console.print(line, style="dim", highlight=False),
    )


def model_shape(config: RunConfig) -> ModelShape:
    """The run's model; no data is read.

    Raises:
        ValueError: the vocabulary's size is only known once the tokenizer is loaded.
    """
    length, packed = config.data.seq_len, config.data.in_document_attention
    if config.model.init_from is not None:
        saved = AutoConfig.from_pretrained(config.model.init_from)
        spec = saved.spec if isinstance(saved, MoEConfig) else None
        return ModelShape(decoder=saved.get_text_config(), moe=spec, seq_len=length, packed=packed)
    fields = dict(config.model.decoder)
    if "vocab_size" not in fields:
        if config.data.tokenizer.path is not None:
            raise ValueError(
                f"the vocabulary of data.tokenizer.path={config.data.tokenizer.path} is not looked up for a plan; add "
                "model.decoder.vocab_size=..."
            )
        fields["vocab_size"] = config.data.tokenizer.vocab_size
    spec = None if config.moe is None else MoESpec.from_dict(config.moe)
    return ModelShape(decoder=decoder_config(fields), moe=spec, seq_len=length, packed=packed)


def chosen_hardware(options: PlanOptions) -> Hardware:
    """The GPU with what the options change.

    Raises:
        ValueError: an unknown GPU or assumption, or a value that is no number.
    """
    if options.hardware not in HARDWARE:
        raise ValueError(f"--hardware {options.hardware!r} is unknown; {nearest(options.hardware, HARDWARE)}")
    changes: dict[str, Any] = {}
    if options.memory is not None:
        changes["memory_bytes"] = _number("--memory", options.memory)
    if options.interconnect is not None:
        node, slash, network = options.interconnect.partition("/")
        if not slash:
            raise ValueError(
                f"--interconnect {options.interconnect!r} must read NODE/NETWORK in bytes per second and GPU, as 450G/50G"
            )
        changes["node_bandwidth"] = _number("--interconnect", node)
        changes["network_bandwidth"] = _number("--interconnect", network)
    known = {field.name for field in dataclasses.fields(Hardware)} - {"name"}
    for assumption in options.assume:
        key, _, value = assumption.partition("=")
        if key not in known:
            raise ValueError(f"--assume {assumption!r}: {key} is no assumption; {nearest(key, known)}")
        changes[key] = _number(f"--assume {key}", value)
    return dataclasses.replace(HARDWARE[options.hardware], **changes)


def _number(name: str, text: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{name} {text!r} is no number, such as 80G")
    return float(match[1]) * _UNITS[match[2].upper()]


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text!r} must be numbers with commas, such as 8,16") from None


def search_space(options: PlanOptions) -> Search:
    """What may be chosen."""
    stages = _numbers("--zero", options.zero)
    if stages is not None and not set(stages) <= {0, 1, 2, 3}:
        raise ValueError(f"--zero {options.zero!r} must name stages 0 to 3")
    return Search(
        ep_sizes=_numbers("--ep", options.ep),
        zero_stages=stages or Search().zero_stages,
        micro_batch_sizes=_numbers("--micro-batch", options.micro_batch),
    )


def chosen(candidates: list[Candidate], hardware: Hardware) -> Candidate:
    """The best one.

    Raises:
        ValueError: none fits; says by how much the smallest misses, and what would help.
    """
    best = candidates[0]
    if best.fits:
        return best
    room = hardware.memory_bytes - hardware.reserved_bytes
    plan = best.memory
    largest = max(("weights", "optimizer", "gradients", "activations"), key=lambda name: getattr(plan, name))
    advice = {
        "weights": "more GPUs per expert group (parallel.ep_size), a larger --gpus with ZeRO 3, or a smaller model",
        "optimizer": "more GPUs, since ZeRO spreads optimizer states over all of them",
        "gradients": "ZeRO 2 or 3, a larger parallel.ep_size, or more GPUs",
        "activations": "a smaller train.micro_batch_size or data.seq_len, or train.activation_checkpointing=true",
    }
    raise ValueError(
        f"nothing fits: the smallest layout ({' '.join(overrides(best.layout))}) is predicted to need "
        f"{plan.peak / 1e9:.1f} GB of {room / 1e9:.1f} GB ({hardware.memory_bytes / 1e9:.0f} GB less "
        f"{hardware.reserved_bytes / 1e9:.1f} GB reserved), {(plan.peak - room) / 1e9:.1f} GB too much; most of it is "
        f"{largest} ({getattr(plan, largest) / 1e9:.1f} GB): use {advice[largest]}"
    )


def as_json(planner: Planner, candidates: list[Candidate], replays: list[Replay]) -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "kind": "predicted",
        "assumptions": dataclasses.asdict(planner.hardware),
        "total_params": planner.owned(1).total,
        "flops_per_token": planner.flops.total,
        "best": None if not candidates[0].fits else overrides(candidates[0].layout),
        "candidates": [
            {**dataclasses.asdict(candidate), "step_seconds": candidate.time.total} for candidate in candidates
        ],
        "replays": [dataclasses.asdict(found) for found in replays],
    }


def render(planner: Planner, candidates: list[Candidate], top: int, console: Console) -> None:
    """Tables of the best layouts, the parts of the first one, and the assumptions."""
    owned, base = planner.owned(1), planner.base
    console.print(
        f"{compact(owned.total)} parameters on {base.world_size} {planner.hardware.name.upper()}, "
        f"{base.gpus_per_node} per node, {planner.batch_size} sequences of {planner.shape.seq_len} tokens per step"
    )
    table = Table(title="Predicted, fastest that fits first", title_justify="left")
    for column in ("EP", "ZeRO", "batch", "recompute", "GB", "fits", "step s", "MFU %", "tokens/s/GPU"):
        table.add_column(column, justify="right")
    for candidate in candidates[:top]:
        layout, time = candidate.layout, candidate.time
        table.add_row(
            str(layout.ep_size),
            str(layout.zero_stage),
            str(layout.micro_batch_size),
            "yes" if layout.activation_checkpointing else "no",
            f"{candidate.memory.peak / 1e9:.1f}",
            "yes" if candidate.fits else "no",
            f"{time.total:.3g}",
            f"{100 * time.mfu:.1f}",
            f"{time.tokens_per_second:.0f}",
        )
    console.print(table)
    _render_parts(candidates[0], console)
    hardware = dataclasses.asdict(planner.hardware)
    assumed = ", ".join(f"{key} {value:.4g}" for key, value in hardware.items() if key != "name")
    console.print(
        f"Assumptions ({planner.hardware.name}; change with --assume): {assumed}", style="dim", highlight=False
    )


def _render_parts(best: Candidate, console: Console) -> None:
    memory, traffic, time = best.memory, best.traffic, best.time
    table = Table(title=f"Predicted for the first: peak in {memory.moment}", title_justify="left")
    for column in ("memory", "GB", "sent", "node GB", "net GB", "time", "s"):
        table.add_column(column, justify="left" if column in ("memory", "sent", "time") else "right")
    held = [(name, getattr(memory, name)) for name in ("weights", "optimizer", "gradients", "activations", "exchange")]
    sent = [(name, getattr(traffic, name)) for name in ("exchange", "gradients", "weights")]
    spent = [(field.name, getattr(time, field.name)) for field in dataclasses.fields(time)][:-2]
    for index in range(max(len(held), len(sent), len(spent))):
        row = ["", "", "", "", "", "", ""]
        if index < len(held):
            row[:2] = held[index][0], f"{held[index][1] / 1e9:.2f}"
        if index < len(sent):
            link = sent[index][1]
            row[2:5] = sent[index][0], f"{link.node / 1e9:.2f}", f"{link.network / 1e9:.2f}"
        if index < len(spent):
            row[5:] = spent[index][0].replace("_", " "), f"{spent[index][1]:.3g}"
        table.add_row(*row)
    console.print(table)


def replays(planner: Planner, names: list[str], layout: Layout) -> list[Replay]:
    """Replay traces at every expert-parallel degree.

    Args:
        planner: of the run.
        names: files, "uniform" or "zipf:EXPONENT".
        layout: of which all but the degree is taken.

    Raises:
        ValueError: the model has no experts, or a trace is of another number of experts.
    """
    spec, shape = planner.shape.moe, planner.shape
    if spec is None:
        raise ValueError("--trace needs a model with experts, and moe is null")
    tokens = layout.micro_batch_size * shape.seq_len
    world = planner.base.world_size
    degrees = [degree for degree in range(2, world + 1) if world % degree == 0 and spec.num_experts % degree == 0]
    found = []
    for name in names:
        trace = _trace(name, spec, planner.top_k, tokens)
        for degree in degrees[:_REPLAY_DEGREES]:
            found.append(
                replay(
                    trace,
                    dataclasses.replace(layout, ep_size=degree),
                    shape.decoder.hidden_size,
                    tokens,
                    planner.hardware,
                )
            )
    return found


def _trace(name: str, spec: MoESpec, top_k: int, num_tokens: int) -> RoutingTrace:
    if Path(name).is_file():
        trace = load_trace(Path(name))
        if trace.num_experts != spec.num_experts:
            raise ValueError(f"--trace {name} has {trace.num_experts} experts, and moe.num_experts={spec.num_experts}")
        return trace
    return synthetic_trace(name, spec.num_experts, top_k, max(num_tokens, 4096))


def render_replays(found: list[Replay], console: Console) -> None:
    """A table of replayed traces."""
    table = Table(
        title="Replayed routing, predicted per MoE layer and micro-batch (load: fullest rank / mean; rows: sent per token)",
        title_justify="left",
    )
    for column in ("trace", "EP", "load", "worst", "rows", "node MB", "net MB", "ms"):
        table.add_column(column, justify="left" if column == "trace" else "right")
    for row in found:
        table.add_row(
            row.trace,
            str(row.ep_size),
            f"{row.imbalance:.2f}",
            f"{row.worst_imbalance:.2f}",
            f"{row.rows_per_token:.2f}",
            f"{row.sent.node / 1e6:.1f}",
            f"{row.sent.network / 1e6:.1f}",
            f"{1e3 * row.seconds:.2f}",
        )
    console.print(table)
