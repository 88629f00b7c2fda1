"""Routing traces: which experts the tokens of real batches chose, saved from a model or made up.

A trace file is safetensors with one tensor "expert_ids" (S, Y, T, K) int32 for S batches and Y MoE layers, and the number of
experts in its metadata.

Legend: S batches, Y MoE layers, T tokens, K top-k, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe.layer import moe_layers
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Choices of experts.

    Attributes:
        name: where it is from.
        num_experts: E.
        expert_ids_SYTK: int32.
    """

    name: str
    num_experts: int
    expert_ids_SYTK: Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids_SYTK.shape[3]

    def save(self, path: Path) -> None:
        """Write the file."""
        save_file({"expert_ids": self.expert_ids_SYTK.contiguous()}, path, {"num_experts": str(self.num_experts)})


def load_trace(path: Path) -> RoutingTrace:
    """Read a file that `RoutingTrace.save` wrote.

    Raises:
        ValueError: it is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            ids = file.get_tensor("expert_ids") if "expert_ids" in names else None
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"routing trace {str(path)!r} cannot be read: {problem}") from None
    if ids is None or ids.dim() != 4 or not metadata.get("num_experts", "").isdecimal():
        raise ValueError(f"{str(path)!r} is no routing trace; make one with `moe trace RUN --out {path.name}`")
    num_experts = int(metadata["num_experts"])
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= num_experts:
        raise ValueError(f"{str(path)!r} has expert ids outside of 0 ... {num_experts - 1}, or none at all")
    return RoutingTrace(name=path.stem, num_experts=num_experts, expert_ids_SYTK=ids)


def synthetic_trace(kind: str, num_experts: int, top_k: int, num_tokens: int, num_layers: int = 4) -> RoutingTrace:
    """A made-up trace of one batch.

    Args:
        kind: "uniform", or "zipf:S": the r-th most popular expert of a layer is drawn with weight r^-S, K different ones per
            token; which expert is popular differs from layer to layer.
        num_experts, top_k: E and K.
        num_tokens, num_layers: size.

    Raises:
        ValueError: the kind is unknown.
    """
    name, _, number = kind.partition(":")
    try:
        exponent = {"uniform": 0.0, "zipf": float(number or 1.0)}[name]
    except (KeyError, ValueError):
        raise ValueError(f"--trace {kind!r} is neither a file nor uniform or zipf:EXPONENT") from None
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(num_layers):
        weights_E = (
            torch.arange(1, num_experts + 1).float().pow(-exponent)[torch.randperm(num_experts, generator=generator)]
        )
        layers.append(
            torch.multinomial(weights_E.expand(num_tokens, -1), top_k, replacement=False, generator=generator).int()
        )
    return RoutingTrace(name=kind, num_experts=num_experts, expert_ids_SYTK=torch.stack(layers)[None])


class TraceRecorder:
    """Collects what the MoE layers of a model choose; see `recording`."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._ids: dict[str, list[Tensor]] = {}

    def add(self, layer: str, routing: object) -> None:
        """Note one batch of a layer."""
        if not isinstance(routing, Routing) or routing.top_k is None:
            raise ValueError("only routers with K experts per token have a routing trace")
        self._ids.setdefault(layer, []).append(routing.expert_ids_N.view(-1, routing.top_k).cpu().int())

    def trace(self, name: str) -> RoutingTrace:
        """What was collected; batches must have been of one size."""
        layers = [torch.stack(batches) for batches in self._ids.values()]
        return RoutingTrace(name=name, num_experts=self.num_experts, expert_ids_SYTK=torch.stack(layers, dim=1))


@contextmanager
def recording(model: nn.Module) -> Iterator[TraceRecorder]:
    """Collect the choices of a model's routers while it runs inside the block.

    Raises:
        ValueError: the model has no MoE layers, or a router without a fixed number of experts per token runs.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("the model has no MoE layers, so no routing either")
    recorder = TraceRecorder(next(iter(layers.values())).num_experts)
    hooks = [
        layer.router.register_forward_hook(lambda module, inputs, routing, name=name: recorder.add(name, routing))
        for name, layer in layers.items()
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
