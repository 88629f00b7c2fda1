"""Ranks that take longer for their part of a step than the others, found from their busy times."""

import statistics
from collections import deque

WINDOW_STEPS = 50
FACTOR = 1.5


class StragglerWatch:
    """Compares each rank's busy time over the last steps with the median of all ranks.

    Args:
        hosts: name of each rank's machine.
        window_steps: steps that a verdict takes in; each rank is looked at once per window.
        factor: how many times the median makes a straggler.
    """

    def __init__(self, hosts: list[str], window_steps: int = WINDOW_STEPS, factor: float = FACTOR) -> None:
        self._hosts, self._factor = hosts, factor
        self._window: deque[list[float]] = deque(maxlen=window_steps)
        self._known: set[int] = set()

    def add(self, busy_seconds: list[float]) -> list[str]:
        """Take one step's busy seconds by rank; returns messages about ranks that became slow, or are no longer."""
        self._window.append(busy_seconds)
        if len(self._window) < (self._window.maxlen or 0):
            return []
        totals = [sum(of_rank) for of_rank in zip(*self._window, strict=True)]
        num_steps = len(self._window)
        self._window.clear()
        # Of two ranks, the faster one: the middle between them would hide a rank that is twice as slow.
        median = statistics.median_low(totals)
        messages = []
        for rank, total in enumerate(totals):
            slow = total > self._factor * median
            name = f"rank {rank} (host {self._hosts[rank]})"
            if slow and rank not in self._known:
                messages.append(
                    f"straggler: {name} took {total / median:.1f} times the median rank's time over {num_steps} steps, "
                    f"{total / num_steps:.3f} s a step against {median / num_steps:.3f} s"
                )
            elif not slow and rank in self._known:
                messages.append(f"straggler: {name} is as fast as the others again")
            (self._known.add if slow else self._known.discard)(rank)
        return messages
