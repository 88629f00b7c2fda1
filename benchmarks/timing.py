"""Wall time of several implementations measured in turns, so that a slow minute of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PRESSURE, _STAT = Path("/proc/pressure/cpu"), Path("/proc/stat")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Repeats of one implementation.

    Attributes:
        seconds: of each repeat.
        waiting: median share of a repeat's time in which some process of the machine waited for a processor (Linux
            pressure stall information); ``None`` where the system does not tell. Above a few percent, others were
            running and the times are too long.
    """

    seconds: tuple[float, ...]
    waiting: float | None

    def quantile_ms(self, q: float) -> float:
        """Quantile of the repeats in milliseconds."""
        return round(float(np.quantile(self.seconds, q)) * 1e3, 3)

    def columns(self) -> dict[str, float | int | None]:
        """The columns that every table of times has."""
        return {
            "median_ms": self.quantile_ms(0.5),
            "p20_ms": self.quantile_ms(0.2),
            "p80_ms": self.quantile_ms(0.8),
            "repeats": len(self.seconds),
            "waiting": self.waiting,
        }


TIMING_COLUMNS = ("median_ms", "p20_ms", "p80_ms", "repeats", "waiting")


def _waited_s() -> float | None:
    try:
        some = _PRESSURE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return int(some.rsplit("total=", 1)[1]) / 1e6


def _idle_share(seconds: float) -> float:
    """Share of all processors' time that is idle over the next ``seconds``."""

    def read() -> tuple[int, int]:
        ticks = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:]]
        return ticks[3] + ticks[4], sum(ticks)

    idle, total = read()
    time.sleep(seconds)
    later_idle, later_total = read()
    return (later_idle - idle) / max(later_total - total, 1)


def wait_until_idle(wait_s: float) -> None:
    """Return when the processors have been idle for a fifth of a second, or after ``wait_s``; at once for 0."""
    deadline = time.perf_counter() + wait_s
    while _STAT.exists() and time.perf_counter() < deadline:
        if _idle_share(0.2) > 0.95:
            return


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    wait_s: float = 0.0,
    report: Callable[[str], None] = lambda line: None,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every function ``repeats`` times, A B C A B C ..., after one round that is not counted.

    ``synchronize`` waits for a device to finish; pass `torch.cuda.synchronize` where the functions run on one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    shares: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-1, repeats):
        for name, function in functions.items():
            wait_until_idle(wait_s)
            synchronize()
            waited, start = _waited_s(), time.perf_counter()
            function()
            synchronize()
            elapsed, waited_after = time.perf_counter() - start, _waited_s()
            if repeat >= 0:
                seconds[name].append(elapsed)
                if waited is not None and waited_after is not None:
                    shares[name].append(min((waited_after - waited) / elapsed, 1.0))
        report(f"  round {repeat + 1} of {repeats}")
    return {
        name: Timing(
            seconds=tuple(seconds[name]),
            waiting=round(float(np.median(shares[name])), 3) if shares[name] else None,
        )
        for name in functions
    }
