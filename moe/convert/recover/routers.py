"""Learning rates of routers, in units of what they change.

A carved model's linear gate has tiny scores, so that sigmoid(score) is nearly 1/2 and every chosen expert has weight 1 nearly.
AdamW moves each weight by about the learning rate whatever its gradient, and a token's score then by up to that times the sum
of |x| over its input: at an ordinary rate many times the spread of the scores, and the routing is lost. The size of the
weights does not tell (a fitted gate has large ones that cancel), so spread and inputs are measured on a window of text.
The same holds for the selection bias, whose usual step of 1e-3 is as large as the spread.

Legend: T tokens, E experts, D model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class RouterScale:
    """What a router sees and gives, as means over tokens.

    Attributes:
        input_sum: sum over D of |x|.
        logit_spread: standard deviation of a token's logits over experts.
        score_spread: the same of its scores, to which a selection bias is added.
    """

    input_sum: float
    logit_spread: float
    score_spread: float

    def learning_rate(self, parameter: nn.Parameter, router_lr: float) -> float:
        """At which a step moves a token's logits by up to ``router_lr`` times their spread.

        Where all logits are equal, as in a new gate of zeros, by up to ``router_lr``. Vectors, such as CMoE's u, meet no input:
        theirs is ``router_lr``.
        """
        if parameter.dim() < 2:
            return router_lr
        return router_lr * (self.logit_spread or 1.0) / max(self.input_sum, 1e-20)


@torch.no_grad()
def router_scales(model: nn.Module, layers: list[MoELayer], input_ids_BL: Tensor) -> list[RouterScale]:
    """Of each layer, on a batch of text; the model should be in eval mode.

    Raises:
        ValueError: a router without logits.
    """
    found: dict[int, RouterScale] = {}

    def reader(index: int) -> Any:
        def read(router: Any, inputs: tuple[Tensor, ...], routing: Any) -> None:
            if routing.logits_TE is None:
                raise ValueError(
                    f"{type(router).__name__} has no logits to measure; set router_lr and balance_rate to 0"
                )
            logits_TE = routing.logits_TE.float()
            is_sigmoid = getattr(router.config, "score", "softmax") == "sigmoid"
            scores_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(-1)
            found[index] = RouterScale(
                input_sum=inputs[0].float().abs().sum(-1).mean().item(),
                logit_spread=logits_TE.std(-1).mean().item(),
                score_spread=scores_TE.std(-1).mean().item(),
            )

        return read

    hooks = [layer.router.register_forward_hook(reader(index)) for index, layer in enumerate(layers)]
    try:
        model(input_ids=input_ids_BL)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[index] for index in range(len(layers))]


def router_parameters(layer: MoELayer) -> list[nn.Parameter]:
    """Parameters of a router that may train: it may be frozen by its own config."""
    return [p for p in layer.router.parameters() if p.requires_grad]


@contextmanager
def moving_bias(layers: list[MoELayer], rates: list[float]) -> Iterator[None]:
    """While it lasts, layers with a selection bias move it at these rates; 0 leaves a layer as it is."""
    specs = [layer.spec for layer in layers]
    for layer, rate in zip(layers, rates, strict=True):
        if rate and hasattr(layer.router, "bias_E"):
            layer.spec = replace(layer.spec, balance=replace(layer.spec.balance, bias_update_rate=rate))
    try:
        yield
    finally:
        for layer, spec in zip(layers, specs, strict=True):
            layer.spec = spec
