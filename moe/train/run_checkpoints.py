"""The checkpoints of a run as its loop sees them: written while it goes on, and how each ended told as an event."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from moe.parallel.checkpoint import Saver, step_dir
from moe.parallel.engine import Engine
from moe.train.config import RunConfig
from moe.train.model import tokenizer_files
from moe.train.run_folder import CHECKPOINTS_DIR

LONG_WAIT_SECONDS = 5.0  # of a step, for the disk


class RunCheckpoints:
    """Saves a run's checkpoints; the same calls on all ranks.

    Args:
        config: the run.
        engine: what is saved.
        tokenizer: goes into every checkpoint, so that one alone can be exported.
        event: receives what the user should know.

    Attributes:
        newest: the newest complete checkpoint.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, tokenizer: PreTrainedTokenizerFast, event: Callable[[str], None]
    ) -> None:
        self.newest: Path | None = None
        self._root = config.run_dir / CHECKPOINTS_DIR
        self._beside = config.train.async_checkpoints
        self._event = event
        timeout = config.parallel.timeout_seconds
        self._saver = Saver(self._root, engine, config.train.keep_last, timeout, tokenizer_files(tokenizer))

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing; once no rank is, `finish` takes no time."""
        return self._saver.busy

    def has(self, step: int) -> bool:
        """Whether the newest one is of this step."""
        return self.newest == step_dir(self._root, step)

    def save(self, step: int, state: dict[str, Any], wait: bool = False) -> str | None:
        """Save ``state`` and the engine after ``step`` steps; with ``wait``, returns why it failed, if it did. Collective."""
        began = time.monotonic()
        self.finish()
        if (waited := time.monotonic() - began) > LONG_WAIT_SECONDS:
            self._event(
                f"waited {waited:.0f} s for the checkpoint before: raise train.checkpoint_every, or write faster"
            )
        self._saver.begin(step, state)
        if self._beside and not wait:
            return None
        problem = self.finish()
        self._saver.release()
        return problem

    def finish(self) -> str | None:
        """Wait for the checkpoint that is being written, if there is one; returns why it failed, if it did. Collective."""
        if not self._saver.under_way:
            return None
        saved = self._saver.collect()
        for warning in saved.warnings:
            self._event(f"checkpoint at step {saved.step}: {warning}: ranks that should be the same have drifted apart")
        if saved.error is None:
            self.newest = saved.path
            return None
        older = "none" if self.newest is None else self.newest.name
        message = f"checkpoint at step {saved.step} failed, the last good one is {older}: {saved.error}"
        self._event(message)
        return message

    def abandon(self) -> None:
        """After an error in training: let this rank's part of what is being written end, whatever the other ranks do."""
        self._saver.abandon()
