"""Learning rates of routers, relative to the size of their weights.

A carved model's linear gate has tiny weights: its scores are scaled down so that sigmoid(score) is nearly 1/2 and every chosen
expert has weight 1 nearly. AdamW moves a weight by about the learning rate whatever its gradient, so one step at an
ordinary rate is many times the gate's own size, and the routing is lost. The same holds for the selection bias, whose
usual step of 1e-3 is as large as the spread of the scores. So both are told in units of what they change.

Legend: T tokens, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer


def router_parameters(layers: list[MoELayer]) -> list[nn.Parameter]:
    """Parameters of all routers that may train: a router may be frozen by its own config."""
    return [p for layer in layers for p in layer.router.parameters() if p.requires_grad]


def router_groups(parameters: list[nn.Parameter], router_lr: float) -> list[dict[str, Any]]:
    """Optimizer groups, one per tensor: its learning rate is ``router_lr`` times its root mean square.

    A tensor of zeros, such as CMoE's u or the gate of an upcycled model, gets ``router_lr`` itself.
    """
    sizes = [p.detach().square().mean().sqrt().item() or 1.0 for p in parameters]
    return [
        {"params": [p], "weight_decay": 0.0, "lr": router_lr * size} for p, size in zip(parameters, sizes, strict=True)
    ]


@contextmanager
def moving_bias(layers: list[MoELayer], rates: list[float]) -> Iterator[None]:
    """While it lasts, layers move their selection biases at these rates; 0 leaves a layer as it is."""
    specs = [layer.spec for layer in layers]
    for layer, rate in zip(layers, rates, strict=True):
        if rate:
            layer.spec = replace(layer.spec, balance=replace(layer.spec.balance, bias_update_rate=rate))
    try:
        yield
    finally:
        for layer, spec in zip(layers, specs, strict=True):
            layer.spec = spec


@torch.no_grad()
def score_spreads(model: nn.Module, layers: list[MoELayer], input_ids_BL: Tensor) -> list[float]:
    """Of each layer: how far a token's scores lie apart, as a standard deviation over experts; 0 without a selection bias."""
    found = [0.0] * len(layers)

    def reader(index: int) -> Any:
        def read(router: Any, inputs: Any, routing: Any) -> None:
            logits_TE = routing.logits_TE.float()
            scores_TE = logits_TE.sigmoid() if router.config.score == "sigmoid" else logits_TE.softmax(-1)
            found[index] = scores_TE.std(-1).mean().item()

        return read

    hooks = [
        layer.router.register_forward_hook(reader(index))
        for index, layer in enumerate(layers)
        if "bias_E" in dict(layer.router.named_buffers())
    ]
    try:
        model(input_ids=input_ids_BL)
    finally:
        for hook in hooks:
            hook.remove()
    return found
