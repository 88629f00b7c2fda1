"""Counts what a real training step holds on this rank: what `memory.py` is checked against."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe.layer import finish_step, moe_layers
from moe.parallel.engine import Engine
from moe.scaling.dry_run import EXCHANGE, SCRATCH, tag_exchanges, tagged_scratch
from moe.scaling.live_bytes import LiveBytes


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Live bytes of one rank in the last of some steps; fields as those of `MemoryPlan`.

    Attributes:
        peaks: largest number of live bytes in forward, backward (with the reduction) and step.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    exchange: int
    peak: int
    peaks: dict[str, int]


def measure_step(
    make_engine: Callable[[], Engine], batch: Callable[[], dict[str, Any]], grad_accum: int, num_steps: int = 3
) -> MeasuredStep:
    """Train ``num_steps`` steps and count in the last one.

    Args:
        make_engine: makes the engine and its model; what it leaves behind is counted.
        batch: the arguments of the model for a micro-batch.
        grad_accum: micro-batches of a step.
        num_steps: the first ones make moments and buffers.
    """
    gc.freeze()  # collecting would walk all of what is imported
    with LiveBytes("cpu", "cuda") as live, tagged_scratch(live):
        engine = make_engine()
        layers = list(moe_layers(engine.model).values())
        tag_exchanges(engine.model, live)
        peaks: dict[str, int] = {}
        activations = exchange = gradients = weights = 0
        for _ in range(num_steps):
            gc.collect()
            static, peaks = live.live - live.live_by_tag[SCRATCH], dict.fromkeys(("forward", "backward", "step"), 0)
            owned = _bytes(_weights(engine.model))
            for _ in range(grad_accum):
                before, sent = live.live, live.live_by_tag[EXCHANGE]
                live.restart_peak()
                loss = engine.module(**batch()).loss
                weights = _bytes(_weights(engine.model))  # with those that ZeRO 3 has gathered
                exchange = live.live_by_tag[EXCHANGE] - sent
                activations = live.live - before - (weights - owned) - exchange
                peaks["forward"] = max(peaks["forward"], live.peak)
                live.restart_peak()
                engine.backward(loss)
                del loss
                peaks["backward"] = max(peaks["backward"], live.peak)
                gc.collect()  # what only reference cycles hold is no gradient
                gradients = live.live - live.live_by_tag[SCRATCH] - static - (_bytes(_weights(engine.model)) - owned)
                live.restart_peak()
                engine.step()
                peaks["step"] = max(peaks["step"], live.peak)
            finish_step(layers)
        kept = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)  # of ZeRO 3, made once
        return MeasuredStep(
            weights=weights,
            optimizer=_bytes(_optimizer_states(engine)),
            gradients=gradients + (0 if kept is None else kept.nbytes),
            activations=activations,
            exchange=exchange,
            peak=max(peaks.values()),
            peaks=peaks,
        )


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """What is behind the parameters; of ZeRO 3, their pieces and those that are whole at this moment."""
    for parameter in model.parameters():
        yield parameter.data
        piece = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            yield piece


def _optimizer_states(engine: Engine) -> Iterator[Tensor]:
    """Moments, and the fp32 weights that are stepped where those are not the model's own."""
    own = {parameter.untyped_storage()._cdata for parameter in _weights(engine.model)}
    for master, state in engine.module.basic_optimizer.state.items():
        yield from (value for value in (master, *state.values()) if value.untyped_storage()._cdata not in own)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the different storages behind tensors."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())
