"""Names the rank that keeps the others waiting, instead of a silent hang.

Every rank publishes what it is doing (`moe.parallel.heartbeat`). A rank that has been waiting in a collective for longer than
the limit looks at the others and accuses those that are not waiting themselves, and those that are silent: stopped, swapped
out, or on a machine that is gone. Where all wait, they wait for different things or for the network, and all are named. The
message has layer, collective and token counts, the step, and the Python stack of who is late; then the process ends with
`STALLED_STATUS`, by which a launcher knows that a restart from the last checkpoint is worth it.

What is no stall: work on one rank that stays within the limit. Evaluation, checkpoints and everything up to the end of a
process's first step (compilation, first reads) have the longer limit. Nothing is watched before training starts and after it ends:
there, the timeout of the process group holds.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

from moe.parallel import trace
from moe.parallel.heartbeat import Courier, Sign, this_host
from moe.parallel.ranks import Ranks
from moe.parallel.stacks import training_threads, waits_for_ranks

STALLED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SLOW_PHASES = frozenset({"evaluation", "checkpoint"})
# Of the process group's timeout: the ranks that wait must still be there to say for whom.
_SLOW_SHARE = 0.9
# Of `stall_seconds`: the rest is for noticing and saying it, so that it is said within them.
_SHARE = 0.8
_BEATS_PER_LIMIT = 20
_LONGEST_BEAT = 5.0
_STACK_DEPTH = 12
_CALL_MACHINERY = "torch/nn/modules/module.py"  # two frames between any module and the one it calls


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who keeps the others waiting.

    Attributes:
        accused: their ranks; empty when all wait, for each other or for the network.
        speaker: the one rank that says so.
        message: for the user.
    """

    accused: tuple[int, ...]
    speaker: int
    message: str


class Watchdog:
    """Watches this rank and all others from a thread; `start` and `stop` it around training, and call `at` along the way.

    Args:
        ranks: this process among all.
        stall_seconds: within which a rank that keeps others waiting is named; four fifths of them it may. 0 watches nothing.
        timeout_seconds: of the process group; slow phases have nine tenths of it.
        report: gets the message on the rank that speaks; it runs in the watchdog's thread.
    """

    def __init__(
        self, ranks: Ranks, stall_seconds: float, timeout_seconds: float, report: Callable[[str], None]
    ) -> None:
        self._ranks, self._limit, self._slow_limit = ranks, stall_seconds * _SHARE, timeout_seconds * _SLOW_SHARE
        self._report = report
        self._watches = stall_seconds > 0 and ranks.world_size > 1
        self._beat_seconds = min(stall_seconds / _BEATS_PER_LIMIT, _LONGEST_BEAT)
        self._place = (0, "start", time.monotonic())
        self._issued, self._latest = 0, ("", 0.0)
        self._observing = ExitStack()
        self._first_step: int | None = None
        self._stopped = threading.Event()
        self._courier: Courier | None = None
        self._beat = 0
        self._accused_since: float | None = None

    def start(self, step: int) -> None:
        """Begin to watch; collective."""
        self._first_step = step
        self.at(step, "start")
        if not self._watches:
            return
        self._observing.enter_context(trace.observe(self._count))
        self._courier = Courier(self._ranks, self._sign(), self._beat_seconds)
        self._thread = threading.Thread(target=self._run, name="moe-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; safe without `start`."""
        self._stopped.set()
        self._observing.close()
        if self._courier is not None:
            self._thread.join()
            self._courier.stop()

    def at(self, step: int, phase: str) -> None:
        """This rank has done ``step`` optimizer steps and enters ``phase``."""
        self._place = (step, phase, time.monotonic())

    def _count(self, collective: trace.Collective) -> None:
        self._issued += 1
        self._latest = (_describe(collective), collective.started)

    def _sign(self) -> Sign:
        step, phase, entered = self._place
        latest, issued_at = self._latest
        quiet = time.monotonic() - max(entered, issued_at)
        slow = phase in SLOW_PHASES or step == self._first_step
        limit = self._slow_limit if slow else self._limit
        stack, waiting = "", None
        # The first half of the limit needs neither, and walking stacks is not free.
        if quiet > min(limit, self._limit) / 2:
            frames = training_threads()
            waiting = self._describe_wait(list(frames.values()))
            main = frames.get(threading.main_thread().ident or 0)
            calls = [call for call in traceback.extract_stack(main) if not call.filename.endswith(_CALL_MACHINERY)]
            stack = "".join(traceback.format_list(calls[-_STACK_DEPTH:]))
        self._beat += 1
        return Sign(
            rank=self._ranks.rank,
            host=this_host(),
            pid=os.getpid(),
            beat=self._beat,
            step=step,
            phase=phase,
            limit=limit,
            quiet=quiet,
            issued=self._issued,
            latest=latest,
            waiting=waiting,
            stack=stack,
        )

    def _describe_wait(self, frames: list[FrameType]) -> str | None:
        """What this rank waits for: a collective of the exchange with layer and counts, or another one by its function."""
        functions = [name for frame in frames if (name := waits_for_ranks(frame)) is not None]
        flights = trace.in_flight()
        # Of a GPU the host may be anywhere while the device waits for the others.
        if functions or (flights and self._ranks.device.type == "cuda"):
            return _describe(flights[0]) if flights else functions[0]
        return None

    def _run(self) -> None:
        assert self._courier is not None
        while not self._stopped.wait(self._beat_seconds):
            sign = self._sign()
            self._courier.tell(sign, read_all=sign.quiet > self._limit / 3)
            self._act(sign, self._courier)

    def _act(self, sign: Sign, courier: Courier) -> None:
        if courier.verdict_is_out or (courier.lost and sign.waiting is None and sign.quiet > sign.limit):
            _end()  # somebody has spoken, or this rank is late and those who waited for it have gone
        if sign.waiting is None:
            return
        seen = courier.seen() | {sign.rank: (sign, 0.0)}
        if courier.lost or courier.silent_seconds > self._silence:  # nobody but its host, rank 0, is known to be late
            host, _ = seen[0]
            seen = {sign.rank: (sign, 0.0)}
            if sign.rank != 0:
                seen[0] = (host, courier.silent_seconds)
        verdict = judge(seen, sign.rank, self._silence)
        if verdict is None:
            self._accused_since = None
            return
        self._accused_since = self._accused_since or time.monotonic()
        if verdict.speaker == self._ranks.rank:
            self._report(verdict.message)
            announce = threading.Thread(target=_quietly(courier.announce_verdict), daemon=True)
            announce.start()
            announce.join(1.0)
            time.sleep(2 * self._beat_seconds)  # the others read it while this process still holds the store
            _end()
        if time.monotonic() - self._accused_since > 4 * self._beat_seconds + 2.0:
            _end()

    @property
    def _silence(self) -> float:
        """Seconds without a sign after which a rank counts as silent; it has been read for longer when it matters."""
        return self._limit / 3


def judge(seen: dict[int, tuple[Sign, float]], observer: int, silence: float) -> Verdict | None:
    """Who is late, as the observer sees it, which waits; None while nobody is.

    Args:
        seen: newest sign of each rank, and for how many seconds its beat has stood still.
        observer: rank of who looks.
        silence: seconds after which a beat that stands still means that the rank is silent.
    """
    waited = seen[observer][0].quiet
    silent = {rank for rank, (_, still) in seen.items() if still > silence}
    late = []
    for rank, (sign, still) in seen.items():
        # Where a silent rank is by now nobody knows; what it keeps waiting is the observer's phase.
        limit = seen[observer][0].limit if rank in silent else sign.limit
        idle = rank in silent or (sign.waiting is None and sign.quiet + still > limit)
        if idle and waited > limit:
            late.append(rank)
    if late:
        speaker = min(rank for rank in seen if rank not in silent and seen[rank][0].waiting is not None)
        return Verdict(accused=tuple(sorted(late)), speaker=speaker, message=_accusation(seen, late, silent))
    if len(seen) > 1 and all(sign.waiting is not None and sign.quiet > sign.limit for sign, _ in seen.values()):
        return Verdict(accused=(), speaker=min(seen), message=_deadlock(seen))
    return None


def _accusation(seen: dict[int, tuple[Sign, float]], late: list[int], silent: set[int]) -> str:
    lines = []
    for rank in sorted(late):
        sign, still = seen[rank]
        place = f"step {sign.step + 1}, {sign.phase}"
        if rank in silent:
            what = f"has been silent for {still:.1f} s: stopped, or its machine or the network is gone; last seen at {place}"
        else:
            what = f"has been at {place} for {sign.quiet + still:.1f} s, in no collective"
        latest = f"; its latest exchange was {sign.latest}" if sign.latest else ""
        lines.append(f"stall: {sign.name} {what}{latest}")
    lines += _waits(seen, [rank for rank in sorted(seen) if rank not in late and seen[rank][0].waiting is not None])
    for rank in sorted(late):
        if seen[rank][0].stack:
            lines.append(f"  main thread of rank {rank}:\n{seen[rank][0].stack.rstrip()}")
    return "\n".join(lines)


def _deadlock(seen: dict[int, tuple[Sign, float]]) -> str:
    places = {(sign.step, sign.phase, (sign.waiting or "").partition(", send")[0]) for sign, _ in seen.values()}
    why = (
        "the ranks wait in different collectives: one of them skipped one"
        if len(places) > 1
        else "all ranks are in the same collective and none leaves it: look at the network"
    )
    lines = [f"stall: {why}", *_waits(seen, sorted(seen))]
    lines += [f"  main thread of rank {rank}:\n{sign.stack.rstrip()}" for rank, (sign, _) in sorted(seen.items())]
    return "\n".join(lines)


def _describe(collective: trace.Collective) -> str:
    layer = collective.layer or "a layer"
    return f"{layer}: {collective.name}, send {[*collective.send]}, receive {[*collective.receive]}"


_SHOWN = 8  # of the ranks that wait: on a thousand, all say the same


def _waits(seen: dict[int, tuple[Sign, float]], ranks: list[int]) -> list[str]:
    lines = [
        f"  {sign.name} waits in {sign.waiting} at step {sign.step + 1}, {sign.phase}, for {sign.quiet:.1f} s"
        for sign, _ in (seen[rank] for rank in ranks[:_SHOWN])
    ]
    return lines + ([f"  and {len(ranks) - _SHOWN} more ranks wait"] if len(ranks) > _SHOWN else [])


def _quietly(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            call()
        except RuntimeError:  # the store is gone: so are those who would have read it
            return

    return run


def _end() -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(STALLED_STATUS)  # no clean-up: it would wait for the rank that does not come
