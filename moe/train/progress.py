"""What a training run shows while it runs: a live bar on a terminal, and now and then a plain line anywhere else.

A log file full of redrawn bars is unreadable, so the bar is for terminals only. Elsewhere a line is written for every
tenth of the run and at least every half minute.
"""

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from moe.train.formats import compact, duration

_SECONDS_BETWEEN_LINES = 30.0


class TrainProgress:
    """Shows step, loss, tokens per second, expert balance and the time left. Use as a context manager.

    total_steps: the last step's number. enabled: False shows nothing at all (all ranks but the first). stream: stderr
    if None. start_step: the step a resumed run continues from, so that the time left is not computed from steps it
    did not run.
    """

    def __init__(
        self, total_steps: int, enabled: bool = True, stream: TextIO | None = None, start_step: int = 0
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        self._total, self._start, self._enabled = total_steps, start_step, enabled
        self._stream = sys.stderr if stream is None else stream
        self._bar: Progress | None = None
        self._begun = self._last_line = time.monotonic()
        self._last_step = start_step
        if enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                _TimeLeft(self),
                console=Console(file=self._stream),
                expand=True,
                redirect_stdout=sys.stdout.isatty(),  # a piped stdout must stay where the user sent it
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, numbers="")

    def update(
        self, step: int, loss: float | None, tokens_per_second: float | None = None, balance: float | None = None
    ) -> None:
        """Show that `step` is done. balance: mean over layers of 1 / (1 + max violation); None for a model without experts."""
        previous, self._last_step = self._last_step, step
        if not self._enabled:
            return
        numbers = [f"loss {loss:.3f}" if loss is not None else "loss –"]
        if tokens_per_second is not None:
            numbers.append(f"{compact(tokens_per_second)} tok/s")
        if balance is not None:
            numbers.append(f"balance {balance:.2f}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers="  ".join(numbers))
            return
        now = time.monotonic()
        tenth = step * 10 // self._total > previous * 10 // self._total
        first = previous == self._start
        if tenth or first or step >= self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = self.time_left()
            self._print("  ".join([f"step {step}/{self._total}", *numbers, *([f"{left} left"] if left else [])]))

    def message(self, text: str) -> None:
        """Show a line of text without disturbing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def time_left(self) -> str:
        """Time to the last step at the mean speed so far, or an empty text where that is unknown or nothing is left."""
        done = self._last_step - self._start
        if done <= 0 or self._last_step >= self._total:
            return ""
        return duration((time.monotonic() - self._begun) / done * (self._total - self._last_step))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        self._begun = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class _TimeLeft(ProgressColumn):
    """Our own estimate: rich's would take a resumed run's earlier steps for work done now."""

    def __init__(self, owner: TrainProgress) -> None:
        super().__init__()
        self._owner = owner

    def render(self, task: Task) -> Text:
        left = self._owner.time_left()
        return Text(f"{left} left" if left else "", style="cyan")
