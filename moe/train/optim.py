"""Learning-rate schedules and optimizer groups."""

import math
from typing import Any

from torch import nn

from moe.scaling.mup import width_factors
from moe.train.config import OptimConfig


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

    A group's ``lr_scale`` is the factor on the learning rate that its parameters take.
    """
    factors = width_factors(model)
    found: dict[tuple[bool, float, float], list[str]] = {(True, 1.0, 1.0): [], (False, 1.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of = factors[name]
            found.setdefault((parameter.dim() >= 2, of.lr, of.weight_decay), []).append(name)
    return [
        {
            "name": ("decay" if decays else "no_decay") + ("" if lr == 1.0 else f" lr x {lr:g}"),
            "params": names,
            "weight_decay": config.weight_decay * weight_decay if decays else 0.0,
            "eps": config.eps * lr,
            "lr_scale": lr,
        }
        for (decays, lr, weight_decay), names in found.items()
    ]
