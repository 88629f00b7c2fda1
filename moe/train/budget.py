"""``moe plan --budget``: the compute-optimal model of a scaling law, and a recipe that trains it.

Size, data and experts are the law's. Learning rate, batch, schedule and routing are those of the paper that the law is from, as
far as this trainer has them; what differs is said in `BudgetPlan.notes`, and so is what lies outside the fitted range.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from moe.scaling.laws import Law, ModelSize
from moe.scaling.laws.joint import learning_rate
from moe.scaling.laws.law import FLOPS
from moe.scaling.laws.optimum import Limits, Optimum, compute_optimal
from moe.scaling.laws.rounding import WholeShape, whole_shape
from moe.train.config import RunConfig, parse_config
from moe.train.formats import compact

GPT2_VOCAB = 50257  # both papers use GPT-2's tokenizer
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a paper trained with.

    Attributes:
        data: of the recipe, without the tokenizer.
        batch_tokens: tokens of an optimizer step, from those of the whole training.
        warmup_tokens: from those of the whole training.
        optim: of the recipe, without learning rate and warm-up.
        router: of a layer with G experts per token.
        layer: other options of the MoE layer.
        notes: what is said with it.
    """

    data: dict[str, Any]
    batch_tokens: Callable[[float], int]
    warmup_tokens: Callable[[float], float]
    optim: dict[str, Any]
    router: Callable[[int], dict[str, Any]]
    layer: dict[str, Any]
    notes: tuple[str, ...]


def _ramped_batch(tokens: float) -> int:
    """The batch that arXiv 2502.05172 section 5.1.1 ends with: 64K tokens, 128K after 0.5B, 256K after 1B."""
    return 65536 if tokens <= 0.5e9 else 131072 if tokens <= 1e9 else 262144


def _switch(granularity: int) -> dict[str, Any]:
    if granularity == 1:
        return {"name": "switch", "jitter": 0.0}
    return {"name": "topk", "top_k": granularity}


_RATE_NOTE = (
    "learning rate: exp(8.39 - 0.81 ln N - 0.25 ln E) of arXiv 2502.05172 eq. 8, found on models of 1 and 8 experts, "
    "granularity 1; try a few around it on a small model"
)

JOINT_SETTING = Setting(
    data={"source": "hub:HuggingFaceFW/fineweb-edu", "streaming": True, "seq_len": 512},
    batch_tokens=_ramped_batch,
    warmup_tokens=lambda tokens: 130e6,
    optim={"betas": [0.9, 0.999], "weight_decay": 0.1, "clip": 0.1, "schedule": "wsd", "decay_fraction": 0.2},
    router=_switch,
    layer={"capacity_factor": 1.0, "balance": {"aux_coef": 0.01, "z_coef": 1e-3}},
    notes=(
        _RATE_NOTE,
        "batch: the paper's setting, at the size that its ramp ends with (64K tokens, 128K after 0.5B, 256K after 1B); no rule, "
        "and the ramp itself is left out",
    ),
)
FINE_GRAINED_SETTING = Setting(
    data={"source": "hub:allenai/c4", "hub_config": "en", "streaming": True, "seq_len": 256},
    batch_tokens=lambda tokens: 2048 * 256,
    warmup_tokens=lambda tokens: 0.01 * tokens,
    optim={"weight_decay": 0.1, "schedule": "cosine", "final_lr_fraction": 0.1},
    router=lambda granularity: {"name": "topk", "top_k": granularity},
    layer={"balance": {"aux_coef": 0.01, "z_coef": 1e-3}},
    notes=(
        f"{_RATE_NOTE}; the law's own runs all had 2e-4",
        "batch: the paper's setting, 0.5M tokens for all its models; no rule",
        "routing: token choice of G experts; the law's runs had expert choice by position and a layer norm behind the experts",
        "experts are SwiGLU with as many parameters as the law's GELU experts",
    ),
)
SETTINGS: dict[str, Setting] = {
    "joint": JOINT_SETTING,
    "fine-grained": FINE_GRAINED_SETTING,
    "fine-grained-16": FINE_GRAINED_SETTING,
    "fine-grained-dense": dataclasses.replace(FINE_GRAINED_SETTING, notes=FINE_GRAINED_SETTING.notes[:2]),
    "own": dataclasses.replace(
        JOINT_SETTING,
        notes=(
            "data, tokenizer, optimizer, batch and routing are those of arXiv 2502.05172: replace them by those of your runs, "
            "for which alone the law holds",
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What to train for a budget.

    Attributes:
        law: by which it was chosen.
        flops: of the budget.
        optima: the best of every kind of model that was tried, best first.
        shape: what is built of the first.
        tokens: D for it, in whole steps.
        loss: predicted for it, in nats per token.
        recipe: that trains it, as in YAML.
        config: the same, checked and complete.
        notes: where settings are from, and what differs.
        extrapolations: what lies outside the range that the law was fitted on.
    """

    law: Law
    flops: float
    optima: tuple[Optimum, ...]
    shape: WholeShape
    tokens: float
    loss: float
    recipe: dict[str, Any]
    config: RunConfig
    notes: tuple[str, ...]
    extrapolations: tuple[str, ...]


def plan_budget(law: Law, flops: float, limits: Limits) -> BudgetPlan:
    """Choose and shape a model.

    Raises:
        ValueError: no model keeps to the limits, or the budget is less than a step.
    """
    optima = compute_optimal(law, flops, GPT2_VOCAB, limits)
    setting = SETTINGS[law.name]
    shape = whole_shape(law, optima[0].size, limits.max_total)
    tokens = flops / FLOPS[law.flops](shape.size)
    batch_tokens = setting.batch_tokens(tokens)
    steps = round(tokens / batch_tokens)
    if steps < 2:
        raise ValueError(
            f"--budget {flops:g} is spent after {tokens:.3g} tokens, less than two batches of {batch_tokens}; raise it"
        )
    tokens = float(steps * batch_tokens)
    recipe = _recipe(law, flops, setting, shape, steps, batch_tokens)
    return BudgetPlan(
        law=law,
        flops=flops,
        optima=tuple(optima),
        shape=shape,
        tokens=tokens,
        loss=law.loss(shape.size, tokens),
        recipe=recipe,
        config=parse_config(recipe),
        notes=setting.notes,
        extrapolations=tuple(law.extrapolations(shape.size, tokens)),
    )


def _recipe(
    law: Law, flops: float, setting: Setting, shape: WholeShape, steps: int, batch_tokens: int
) -> dict[str, Any]:
    size, heads = shape.size, shape.width // shape.head_dim
    seq_len = setting.data["seq_len"]
    warmup = min(round(setting.warmup_tokens(steps * batch_tokens) / batch_tokens), steps // 4)
    granularity = round(size.granularity)
    layer = {
        "num_experts": size.num_experts,
        "granularity": granularity,
        "router": setting.router(granularity),
        **setting.layer,
    }
    return {
        "name": f"{law.name}-{flops:.3g}".replace("+", ""),
        "model": {
            "decoder": {
                "model_type": "llama",
                "vocab_size": -(-size.vocab // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
                "hidden_size": shape.width,
                "intermediate_size": shape.intermediate,
                "num_hidden_layers": shape.blocks,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_dim": shape.head_dim,
                "max_position_embeddings": seq_len,
                "tie_word_embeddings": False,
            }
        },
        "moe": layer if size.expansion > 1 else None,
        "data": {**setting.data, "tokenizer": {"path": "openai-community/gpt2"}},
        "optim": {
            **setting.optim,
            "lr": float(f"{learning_rate(size.active, size.expansion):.3g}"),
            "warmup_steps": warmup,
        },
        "train": {
            "steps": steps,
            "batch_size": batch_tokens // seq_len,
            "micro_batch_size": 8,
            "precision": "bf16",
            "checkpoint_every": max(steps // 20, 1),
            "log_every": 10,
        },
    }


def write_config(plan: BudgetPlan, path: Path) -> None:
    """The recipe as YAML, with what it was chosen by in a comment."""
    size = plan.shape.size
    head = [
        f"Compute-optimal for {plan.flops:.3g} training FLOPs by the law {plan.law.name} ({plan.law.source}), which predicts a",
        f"loss of {plan.loss:.3f} nats per token: {compact(size.active)} active and {compact(size.total)} total parameters, "
        f"{compact(plan.tokens)} tokens.",
        *(f"Extrapolated: {sentence}." for sentence in plan.extrapolations),
        *(f"{note[0].upper()}{note[1:]}." for note in plan.notes),
    ]
    text = yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True)
    path.write_text("".join(f"# {line}\n" for line in head) + text, encoding="utf-8")


def as_json(plan: BudgetPlan) -> dict[str, Any]:
    """Everything, as plain data."""

    def of(optimum: Optimum) -> dict[str, Any]:
        return {**_sizes(optimum.size), "tokens": optimum.tokens, "loss": optimum.loss}

    return {
        "kind": "predicted",
        "law": plan.law.name,
        "flops": plan.flops,
        "optima": [of(optimum) for optimum in plan.optima],
        "chosen": {
            **_sizes(plan.shape.size),
            "width": plan.shape.width,
            "blocks": plan.shape.blocks,
            "tokens": plan.tokens,
            "loss": plan.loss,
            "learning_rate": plan.config.optim.lr,
            "batch_tokens": plan.config.train.batch_size * plan.config.data.seq_len,
            "steps": plan.config.train.steps,
        },
        "extrapolations": list(plan.extrapolations),
        "notes": list(plan.notes),
    }


def _sizes(size: ModelSize) -> dict[str, float]:
    names = ("active", "active_blocks", "total", "total_blocks", "expansion", "granularity", "num_experts")
    return {name: getattr(size, name) for name in names}


def render(plan: BudgetPlan, console: Console) -> None:
    """Tables of the optima and the choice, then notes."""
    table = Table(
        title=f"Compute-optimal for {plan.flops:.3g} FLOPs by {plan.law.name}, predicted", title_justify="left"
    )
    for column in ("E", "G", "experts", "N active", "without emb.", "N total", "tokens", "loss"):
        table.add_column(column, justify="right")
    for optimum in plan.optima:
        table.add_row(*_row(optimum.size, optimum.tokens, optimum.loss))
    table.add_section()
    table.add_row(*_row(plan.shape.size, plan.tokens, plan.loss), style="bold")
    console.print(table)
    config, shape = plan.config, plan.shape
    console.print(
        f"Last row: what is built. Width {shape.width}, {shape.blocks} blocks, FFN {shape.intermediate}, "
        f"{shape.width // shape.head_dim} heads; {config.train.steps} steps of {config.train.batch_size} x "
        f"{config.data.seq_len} tokens, learning rate {config.optim.lr:g}",
        highlight=False,
        soft_wrap=True,
    )
    for sentence in plan.extrapolations:
        console.print(f"extrapolated: {sentence}", style="yellow", highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)


def _row(size: ModelSize, tokens: float, loss: float) -> list[str]:
    return [
        f"{size.expansion:g}",
        f"{size.granularity:g}",
        str(size.num_experts),
        compact(size.active),
        compact(size.active_blocks),
        compact(size.total),
        compact(tokens),
        f"{loss:.3f}",
    ]
