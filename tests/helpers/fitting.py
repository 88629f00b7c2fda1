"""A router inside a real layer and a real model, trained for some steps."""

from dataclasses import dataclass
from typing import Any

import torch
from models.tiny import layers_of, make_model, tokens
from torch import Tensor

from helpers.layer_oracle import make_layer
from moe.layer import MoELayer, finish_step
from moe.models import MoEForCausalLM

DIM = 6


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What `fit_layer` leaves.

    Attributes:
        layer: after training.
        losses: () mean squared error of each step.
        densities: share of all token-expert pairs that were assigned, by step.
        moved: names of the router's parameters that changed.
    """

    layer: MoELayer
    losses: list[float]
    densities: list[float]
    moved: set[str]


def teacher(x_TD: Tensor) -> Tensor:
    """A function that is another linear one on each side of a plane."""
    flipped_TD = x_TD.flip(-1)
    return torch.where(x_TD[:, :1] > 0, flipped_TD, -x_TD)


def fit_layer(
    num_steps: int,
    *,
    lr: float = 0.02,
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 64,
    mean: float = 0.0,
    **spec: Any,
) -> Fitted:
    """Train a layer of ``spec`` by AdamW on tokens around ``mean``; every loss and gradient must be finite."""
    layer = make_layer(DIM, **spec).to(dtype)
    before = {name: value.detach().clone() for name, value in layer.router.named_parameters()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    losses, densities = [], []
    for _ in range(num_steps):
        x_TD = (torch.randn(num_tokens, DIM) + mean).to(dtype).requires_grad_()
        y_TD = layer(x_TD)
        assert y_TD.dtype == dtype
        loss = (y_TD.float() - teacher(x_TD.detach().float())).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        optimizer.step()
        sums = layer.finish_step().sums
        losses.append(loss.item())
        densities.append((sums["assigned"] / sums["tokens"]).item() / layer.num_experts)
    moved = {name for name, value in layer.router.named_parameters() if not torch.equal(value, before[name])}
    return Fitted(layer=layer, losses=losses, densities=densities, moved=moved)


def check_training(router: dict[str, Any], **spec: Any) -> Fitted:
    """The loss falls in fp32 and in bf16, and every parameter of the router moves; also with one token and with none."""
    for dtype in (torch.bfloat16, torch.float32):
        fitted = fit_layer(60, dtype=dtype, router=router, **spec)
        assert sum(fitted.losses[-5:]) < 0.8 * sum(fitted.losses[:5]), f"{dtype}: {fitted.losses[::10]}"
        assert fitted.moved == {name for name, _ in fitted.layer.router.named_parameters()}
    for training in (True, False):
        for num_tokens in (0, 1):
            x_TD = torch.randn(num_tokens, DIM, requires_grad=True)
            y_TD = fitted.layer.train(training)(x_TD)
            assert y_TD.shape == x_TD.shape
            y_TD.square().sum().backward()
            assert x_TD.grad is not None
            assert x_TD.grad.isfinite().all()
    return fitted


def one_model_step(router: dict[str, Any], **moe: Any) -> MoEForCausalLM:
    """A small causal model after one optimizer step, closed over its layers together."""
    model = make_model(router=router, **moe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids_BL = tokens(2, 9)
    loss = model(input_ids=ids_BL, labels=ids_BL).loss
    loss.backward()
    assert loss.isfinite()
    optimizer.step()
    finish_step(layers_of(model))
    with torch.no_grad():
        assert model.eval()(input_ids=ids_BL, labels=ids_BL).loss < loss
    return model.train()
