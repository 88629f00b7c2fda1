"""Optimizers, their groups, and learning-rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe.scaling.mup import hidden_matrices, width_factors
from moe.train.config import OptimConfig
from moe.train.muon import MuonAdamW


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """A torch optimizer and its options; groups come from `param_groups`."""

    optimizer_class: type[torch.optim.Optimizer]
    options: dict[str, Any]


def _adamw(config: OptimConfig) -> OptimizerChoice:
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    return OptimizerChoice(optimizer_class=torch.optim.AdamW, options=options)


def _muon(config: OptimConfig) -> OptimizerChoice:
    return OptimizerChoice(
        optimizer_class=MuonAdamW, options={**_adamw(config).options, "momentum": config.muon_momentum}
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig], OptimizerChoice]] = {"adamw": _adamw, "muon": _muon}


def choose_optimizer(config: OptimConfig) -> OptimizerChoice:
    """The optimizer that ``optim.name`` means."""
    return OPTIMIZERS[config.name](config)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0).

    Linear warm-up, then: constant; a half cosine to the final value; or "wsd", constant and then a linear decay over the
    last ``decay_fraction`` of the steps (MiniCPM, arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr * config.final_lr_fraction
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = max(round(total_steps * config.decay_fraction), 1)
    remaining = min((total_steps - step) / decay_steps, 1.0)
    return low + (config.lr - low) * remaining


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Optimizer groups by parameter name: matrices decay, vectors (norms, biases) do not; muP may part them further.

    A group's ``lr_scale`` is the factor on the learning rate that its parameters take; those with ``muon`` are stepped by it.
    """
    muon = hidden_matrices(model) if config.name == "muon" else set()
    factors = width_factors(model, muon)
    found: dict[tuple[str, float, float], list[str]] = {("decay", 1.0, 1.0): [], ("no_decay", 1.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "muon" if name in muon else "decay" if parameter.dim() >= 2 else "no_decay"
            found.setdefault((kind, factors[name].lr, factors[name].weight_decay), []).append(name)
    return [
        {
            "name": kind + ("" if lr == 1.0 else f" lr x {lr:g}"),
            "params": names,
            "weight_decay": 0.0 if kind == "no_decay" else config.weight_decay * weight_decay,
            "eps": config.eps * lr,
            "lr_scale": lr,
            **({"muon": True} if kind == "muon" else {}),
        }
        for (kind, lr, weight_decay), names in found.items()
    ]
