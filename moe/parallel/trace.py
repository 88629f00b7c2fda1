"""Which collective this rank is in: a record around each one, for a watchdog to name and for counters to add up.

Every collective of an expert exchange is announced here when it is issued and struck off when it has been waited for, so a
thread beside the training can say, after a stall, which layer and collective this rank is in and how many rows it sends to
and expects from every peer:

    for collective in trace.in_flight():        # oldest first; empty while nothing is under way
        print(collective)                       # model.layers.3.mlp: dispatch rows, send [4, 0], receive [2, 9], for 31.0 s

Recording costs a list append and is always on. Reading is safe from another thread. With NCCL the host runs ahead of the
device: a collective that the host has handed over stays in the list until the device has finished it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Work(Protocol):
    """A handle of an asynchronous collective, as in `torch.distributed`."""

    def is_completed(self) -> bool:
        """Whether it is done, without waiting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Collective:
    """One collective call of this rank.

    Attributes:
        name: what travels and in which pass, such as "dispatch rows 1/2".
        layer: the layer's module name; "" where it was not told.
        send, receive: units (rows, assignments) for and from each peer, in the order of ``peers``.
        peers: ranks of the expert-parallel group that take part, in group order; empty where it was not told.
        rank: this rank's own number among ``peers``; -1 where it was not told.
        unit_bytes: bytes of one unit on the wire.
        started: `time.monotonic` when it was issued.
    """

    name: str
    layer: str
    send: tuple[int, ...]
    receive: tuple[int, ...]
    peers: tuple[int, ...] = ()
    rank: int = -1
    unit_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it was issued."""
        return time.monotonic() - self.started

    def __str__(self) -> str:
        layer = self.layer or "a layer"
        return f"{layer}: {self.name}, send {[*self.send]}, receive {[*self.receive]}, for {self.seconds:.1f} s"


Observer = Callable[[Collective], None]

_lock = threading.Lock()
_open: list[Collective] = []
_handed_over: list[tuple[Collective, Work]] = []
_observers: list[Observer] = []


def begin(collective: Collective) -> Collective:
    """Announce a collective that is being issued; observers hear of it."""
    with _lock:
        _open.append(collective)
    for observer in tuple(_observers):
        observer(collective)
    return collective


def end(collective: Collective, work: Work | None = None) -> None:
    """Strike off a collective that was waited for; with ``work``, once that is complete (the device may still run it)."""
    with _lock:
        _open.remove(collective)
        if work is not None:
            _handed_over.append((collective, work))
        _strike_off_completed()


def _strike_off_completed() -> None:
    _handed_over[:] = [(collective, work) for collective, work in _handed_over if not work.is_completed()]


def in_flight() -> tuple[Collective, ...]:
    """The collectives that this rank has issued and that are not complete, oldest first."""
    with _lock:
        _strike_off_completed()
        found = [collective for collective, _ in _handed_over] + _open
    return tuple(sorted(found, key=lambda collective: collective.started))


@contextmanager
def collective(name: str, layer: str, send: Sequence[int], receive: Sequence[int]) -> Iterator[Collective]:
    """Record a collective that is issued and waited for inside the block. After an exception it stays recorded."""
    record = begin(Collective(name=name, layer=layer, send=tuple(send), receive=tuple(receive)))
    yield record
    end(record)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Let ``observer`` hear of every collective that is issued inside the block, on the thread that issues it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
