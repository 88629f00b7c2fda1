"""Rows on their way over hops, as autograd nodes that start and end a passage, so that others run in between.

Outward, each hop copies the rows that its peers need; inward, it returns them along the same ways and adds up what comes
back to the same row, in fp32. One is the adjoint of the other, so the backward of a passage is the opposite one: the
gradient of starting a passage is what the opposite passage ends with. Autograd runs nodes in the reverse order of their
forward, so what overlaps in forward overlaps in backward, and all ranks issue collectives in the same order.

Between start and end only a scalar connects the nodes, since the rows are not there yet. It requires a gradient whenever
gradients are recorded, whatever the rank's rows do: a rank without rows takes part in every collective of backward.

Legend: R rows, D model, P travelling rows, p those of one peer.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.parallel.collectives import Label, PendingRows, start_all_to_all
from moe.parallel.exchange.hop import Leg
from moe.parallel.exchange.payload import Payload


def new_anchor(device: torch.device) -> Tensor:
    """What a rank's first node hangs on: () with a gradient where gradients are recorded."""
    return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())


@dataclass(frozen=True, kw_only=True)
class _Cargo:
    """What both ways of a tensor share; see `Transfer`."""

    payload: Payload
    dtype: torch.dtype
    layer: str
    legs: list[Leg] = field(default_factory=list)


class _Passage:
    """One way of a tensor: `start`, `advance` to each further hop, `finish`; without gradients.

    It knows the cargo and not the `Transfer`: a cycle would keep the legs' indices until Python collects garbage.
    """

    def __init__(self, cargo: _Cargo, outward: bool, name: str) -> None:
        self._cargo, self._outward, self._name = cargo, outward, name
        self._passed = 0
        self._pending: PendingRows | None = None

    def start(self, rows_RD: Tensor) -> None:
        self._passed = 0
        self._send(self._cargo.payload.encode(rows_RD, self._cargo.dtype))

    def advance(self) -> None:
        self._send(self._receive())

    def finish(self) -> Tensor:
        wire = self._receive()
        return (self._cargo.payload.decode(wire) if self._outward else wire).to(self._cargo.dtype)

    def _leg(self) -> Leg:
        legs = self._cargo.legs
        return legs[self._passed] if self._outward else legs[len(legs) - 1 - self._passed]

    def _send(self, wire: Tensor) -> None:
        leg = self._leg()
        label = Label(name=f"{self._name}, hop {self._passed + 1}", layer=self._cargo.layer)
        if self._outward:
            self._pending = start_all_to_all(wire[leg.rows_P], leg.send_W, leg.receive_W, leg.peers, label)
        else:
            self._pending = start_all_to_all(wire, leg.receive_W, leg.send_W, leg.peers, label)

    def _receive(self) -> Tensor:
        assert self._pending is not None
        received, self._pending, leg = self._pending.wait(), None, self._leg()
        self._passed += 1
        if self._outward:
            return received
        cargo = self._cargo
        parts_PD = cargo.payload.decode(received)
        # at least fp32: partial sums would otherwise be rounded between additions
        wide = torch.promote_types(parts_PD.dtype, torch.float32)
        sums_RD = torch.zeros((leg.num_rows, parts_PD.shape[1]), device=received.device, dtype=wide)
        # Peer by peer, from each of which a row gets one part at most: the order of additions is the same every time.
        for rows_p, parts_pD in zip(leg.rows_P.split(leg.send_W), parts_PD.split(leg.send_W), strict=True):
            sums_RD.index_add_(0, rows_p, parts_pD.to(wide))
        more = self._passed < len(cargo.legs)
        return cargo.payload.encode(sums_RD, cargo.dtype) if more else sums_RD


class Transfer:
    """The passage of one tensor in the forward, and its opposite in the backward.

    Args:
        payload: how rows look on the wire.
        dtype: of the rows at both ends.
        what: for `moe.parallel.trace`, such as "rows, chunk 1 of 2".
        layer: as there.
        outward: the direction of the forward.

    Attributes:
        legs: one per hop, in outward order; appended as hops are planned.
    """

    def __init__(self, payload: Payload, dtype: torch.dtype, what: str, layer: str, *, outward: bool) -> None:
        cargo = _Cargo(payload=payload, dtype=dtype, layer=layer)
        self.legs = cargo.legs
        there, back = ("dispatch", "combine") if outward else ("combine", "dispatch")
        self.forward = _Passage(cargo, outward, f"forward {there} {what}")
        self.backward = _Passage(cargo, not outward, f"backward {back} {what}")
        self._anchor: Tensor | None = None

    def start(self, rows_RD: Tensor, anchor: Tensor) -> None:
        """Send rows off."""
        self._anchor = _Start.apply(rows_RD, anchor, self)

    def advance(self) -> None:
        """Wait for one hop and start the next."""
        self._anchor = _Advance.apply(self._anchor, self)

    def finish(self) -> Tensor:
        """The rows at the other end, in the dtype of those that left."""
        rows_RD, self._anchor = _Finish.apply(self._anchor, self), None
        return rows_RD


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, anchor: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.forward.start(rows_RD)
        return torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, danchor: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transfer.backward.finish(), None, None


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.forward.advance()
        return torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, danchor: Tensor) -> tuple[Tensor | None, ...]:
        ctx.transfer.backward.advance()
        return danchor, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer, ctx.anchor_device = transfer, anchor.device
        return transfer.forward.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.transfer.backward.start(drows_RD)
        return torch.zeros((), device=ctx.anchor_device), None
