"""What an MoE layer shares with the training loop around it: the loss scale, the padding mask, and its statistics.

Auxiliary losses are attached to the activations by an autograd function: it leaves the forward value alone and adds the
losses' gradients in backward. Nobody has to collect them, so they survive activation checkpointing, HF `Trainer`,
`accelerate` and DeepSpeed alike. Backward also is the one event that happens exactly once per micro-batch in all of these
(a checkpointed forward runs twice), so statistics are committed there.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_num_steps = 0


def _count_step(*_: Any) -> None:
    global _num_steps
    _num_steps += 1


# Version counters do not tell: fused optimizers, the default of HF `Trainer`, leave them alone.
register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Steps that `torch.optim` optimizers took in this process."""
    return _num_steps


class RoutingContext:
    """Shared by all MoE layers of a model.

    Attributes:
        loss_scale: d(what backward is called on) / d(the model's loss). `record_loss_scale` sets it at the start of each
            backward, so that loss scaling and gradient accumulation apply to auxiliary losses as to the loss itself.
        token_mask_T: (T,) bool, False at padding, or ``None``; padding counts in no loss and no statistic.
        input_ids_T: (T,) int64 vocabulary ids of the tokens, or ``None`` where the model was given embeddings.
    """

    def __init__(self) -> None:
        self.loss_scale: Tensor | float = 1.0
        self.token_mask_T: Tensor | None = None
        self.input_ids_T: Tensor | None = None


class _RecordLossScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: RoutingContext, share: Tensor | float) -> Tensor:
        ctx.context, ctx.share = context, share
        return loss.clone()  # not a view: trainers scale the loss in place

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        ctx.context.loss_scale = dloss.detach() * ctx.share
        return dloss, None, None


def record_loss_scale(loss: Tensor, context: RoutingContext, share: Tensor | float = 1.0) -> Tensor:
    """Identity on ``loss``; in backward, notes its gradient times ``share`` for the auxiliary losses.

    ``share`` is this micro-batch's part of the whole step where the loss is a sum over tokens divided by the step's
    token count (transformers' ``num_items_in_batch``); 1 where the loss is the micro-batch's mean.
    """
    return _RecordLossScale.apply(loss, context, share)


class MicroBatchListener(Protocol):
    """What `attach_loss` tells of each micro-batch's backward; an `MoELayer`."""

    context: RoutingContext

    def on_backward(self, counts: list[Tensor], scalars: dict[str, Tensor]) -> None:
        """Called once per micro-batch, with what was given to `attach_loss`."""


# Listeners by number, so that a compiled graph can name one. Weak: a number does not keep a model alive.
_listeners: WeakValueDictionary[int, MicroBatchListener] = WeakValueDictionary()
_numbers = itertools.count()


def new_listener(listener: MicroBatchListener) -> int:
    """A number for ``listener``, different for each object."""
    number = next(_numbers)
    _listeners[number] = listener
    return number


# An op, so that ``torch.compile`` neither looks inside nor runs it while tracing.
@torch.library.custom_op("moe::on_backward", mutates_args=())
def _on_backward(listener: int, names: str, counts: list[Tensor], scalars: list[Tensor]) -> Tensor:
    """Tell the listener; returns the loss scale, () fp32."""
    owner = _listeners[listener]
    owner.on_backward(counts, dict(zip(names.split(","), scalars, strict=True)))
    return torch.as_tensor(owner.context.loss_scale, device=scalars[0].device, dtype=torch.float32).clone()


@_on_backward.register_fake
def _(listener: int, names: str, counts: list[Tensor], scalars: list[Tensor]) -> Tensor:
    return scalars[0].new_empty((), dtype=torch.float32)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_TD: Tensor, loss: Tensor, listener: int, names: str, num_counts: int, *observed: Tensor
    ) -> Tensor:
        ctx.listener, ctx.names, ctx.num_counts = listener, names, num_counts
        ctx.save_for_backward(*observed)
        return y_TD.detach()  # same memory but no view, so that a residual may be added in place

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        # Under non-reentrant checkpointing, asking for a saved tensor runs the forward again. That must come before the
        # listener hears of it: the forward would find its own counts among those of earlier micro-batches.
        observed = list(ctx.saved_tensors)
        scale = _on_backward(ctx.listener, ctx.names, observed[: ctx.num_counts], observed[ctx.num_counts :])
        return dy_TD, scale, None, None, None, *[None] * len(observed)


def attach_loss(y_TD: Tensor, loss: Tensor, listener: int, counts: list[Tensor], scalars: dict[str, Tensor]) -> Tensor:
    """Identity on ``y_TD``; in backward, starts the gradient of ``loss`` and tells the listener of that number, once.

    Args:
        y_TD: what the loss is attached to.
        loss: () fp32.
        listener: of `new_listener`.
        counts, scalars: detached tensors to tell it; at least one scalar, no comma in their names.
    """
    return _AttachLoss.apply(y_TD, loss, listener, ",".join(scalars), len(counts), *counts, *scalars.values())


@dataclass
class LayerStats:
    """Routing statistics of one layer, summed over the micro-batches since the last optimizer step (this rank's tokens).

    Attributes:
        counts_E: (E,) int64 assignments per expert before drops; ``None`` before the first micro-batch.
        sums: detached sums over micro-batches of the scalars by name: "entropy", "logit_norm", "dropped", "assigned",
            "tokens" (without padding), each loss as "loss/NAME" (its unscaled value) and "aux_loss" (their weighted total).
        num_micro_batches: how many were summed.
    """

    counts_E: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    num_micro_batches: int = 0

    def add(self, counts_E: Tensor, scalars: dict[str, Tensor]) -> None:
        """Add one micro-batch."""
        self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_micro_batches += 1
