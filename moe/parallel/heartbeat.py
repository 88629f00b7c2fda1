"""Signs of life: what each rank is doing, told to the others through a store that no training thread waits for.

Every rank writes its own entry a few times within the time limit, and reads the others' only once it has been waiting
for a while: in a run without trouble the traffic is one small write and read per rank and beat.

The store lives in the process of rank 0, in a thread of torch's own that answers whatever Python does there. A client's call
blocks for as long as that process is stopped, so all calls are made by one thread of this file, and `Courier.silent_seconds`
tells how long the store has not answered: then it is rank 0 that is silent.
"""

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from moe.parallel.ranks import Ranks

VERDICT_KEY = "verdict"
_STORE_TIMEOUT = timedelta(seconds=60)
_SECONDS_TO_STOP = 5.0


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What one rank was doing at one time.

    Attributes:
        rank, host, pid: who.
        beat: grows with every sign; a rank whose beat stands still is silent.
        step, phase: optimizer steps done, and the part of the next one that it is in.
        limit: seconds that this phase may keep others waiting.
        quiet: seconds since it entered the phase, or since it issued its latest collective of an exchange.
        issued, latest: number of collectives of exchanges that it has issued, and the newest with layer and counts.
        waiting: the collective that it waits in, with layer and token counts where known; None when it waits for nobody.
        stack: of its main thread, once it has been quiet for a while; else empty.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    phase: str
    limit: float
    quiet: float
    issued: int
    latest: str
    waiting: str | None
    stack: str = ""

    def encode(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes | str) -> "Sign":
        """From the store."""
        return Sign(**json.loads(text))

    @property
    def name(self) -> str:
        """How a message names the rank."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Courier:
    """Carries signs to and from the store in a thread of its own.

    Args:
        ranks: this process among all; constructing a courier is collective.
        beat_seconds: between two signs.
    """

    def __init__(self, ranks: Ranks, first: Sign, beat_seconds: float) -> None:
        self._ranks, self._beat_seconds = ranks, beat_seconds
        host = os.environ.get("MASTER_ADDR", "localhost")
        # The server is there, and its port known to all, before anybody connects.
        server = dist.TCPStore(host, 0, is_master=True, timeout=_STORE_TIMEOUT) if ranks.is_main else None
        port = ranks.gather(server.port if server is not None else None)[0]
        self._server = server
        self._store = dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
        self._store.set(_key(ranks.rank), first.encode())
        signs = ranks.gather(first)  # every key exists from here on: no read blocks for want of one
        self._own = first
        # Known before the first beat: rank 0 may stop before it, and the store with it.
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[Sign, float]] = {sign.rank: (sign, self._answered) for sign in signs}
        self._read_all = threading.Event()
        self._stopped = threading.Event()
        self.lost = self.verdict_is_out = False
        self._thread = threading.Thread(target=self._run, name="moe-courier", daemon=True)
        self._thread.start()

    def tell(self, sign: Sign, read_all: bool) -> None:
        """Make ``sign`` the one that is sent from now on; ``read_all`` asks for everybody else's as well."""
        self._own = sign
        if read_all:
            self._read_all.set()
        else:
            self._read_all.clear()

    def seen(self) -> dict[int, tuple[Sign, float]]:
        """Newest known sign of each rank, and for how many seconds its beat has stood still."""
        now = time.monotonic()
        return {rank: (sign, now - heard) for rank, (sign, heard) in self._seen.copy().items()}

    @property
    def silent_seconds(self) -> float:
        """Since the store last answered."""
        return time.monotonic() - self._answered

    def announce_verdict(self) -> None:
        """Let the other ranks know that this one has named the culprit. May block if the store is silent."""
        self._store.set(VERDICT_KEY, str(self._ranks.rank))

    def stop(self) -> None:
        """No more signs. The thread must be gone before the interpreter ends: one that comes back from C++ then aborts it."""
        self._stopped.set()
        self._thread.join(_SECONDS_TO_STOP)  # for ever in its call where rank 0 is stopped: it will not come back

    def _run(self) -> None:
        while not self.verdict_is_out and not self._stopped.wait(self._beat_seconds):
            try:
                self._store.set(_key(self._ranks.rank), self._own.encode())
                # Rank 0's in every beat: when its process stops, so does the store.
                wanted = range(self._ranks.world_size) if self._read_all.is_set() else range(1)
                texts = self._store.multi_get([_key(rank) for rank in wanted])
                self.verdict_is_out = self._store.check([VERDICT_KEY])
            except RuntimeError:  # the process that held it is gone
                self.lost = True
                return
            now = time.monotonic()
            for rank, text in zip(wanted, texts, strict=True):
                sign = Sign.decode(text)
                before = self._seen.get(rank)
                if before is None or before[0].beat != sign.beat:
                    self._seen[rank] = (sign, now)
            self._answered = now


def _key(rank: int) -> str:
    return f"sign/{rank}"


def this_host() -> str:
    """Name of this machine as messages show it."""
    return socket.gethostname()
