"""What the threads of this process are doing, seen from beside: whether one waits for other ranks, and for how much of the time.

A thread that waits for others sits in a C call, and the innermost Python frame is that of the function which made it: in
torch's own collectives, in DeepSpeed, or in the files here that wait for a handle.
"""

import sys
import threading
import time
from types import FrameType

_WAITING_FILES = ("/torch/distributed/", "/deepspeed/", "/moe/parallel/collectives.py", "/moe/parallel/ranks.py")
_SECONDS_BETWEEN_SAMPLES = 0.05


def training_threads() -> dict[int, FrameType]:
    """Innermost frames of the main thread and of those that Python did not start, such as autograd's for a GPU.

    What else runs here (savers, loaders, watchdogs) may wait without the training doing so.
    """
    main = threading.main_thread().ident
    beside = {
        thread.ident
        for thread in threading.enumerate()
        if thread.ident != main and not isinstance(thread, threading._DummyThread)
    }
    return {ident: frame for ident, frame in sys._current_frames().items() if ident not in beside}


def waits_for_ranks(frame: FrameType) -> str | None:
    """Name of the function in which the thread with this innermost frame waits for other ranks; None if it does not."""
    path = frame.f_code.co_filename
    return frame.f_code.co_name if any(part in path for part in _WAITING_FILES) else None


class BusyMeter:
    """Measures for how long the main thread was not waiting for other ranks, by looking at it 20 times a second.

    All ranks take the same time for a step, because they wait for each other; what a rank did not wait is what it took itself.
    A host that waits for its GPU counts as busy wherever it does so outside of this package's collectives.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._busy = self._samples = 0
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moe-busy-meter", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._begun = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Look no more; safe without `start`."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def take(self) -> float:
        """Busy seconds since the last call."""
        now = time.monotonic()
        share = self._busy / self._samples if self._samples else 1.0
        seconds, self._begun = now - self._begun, now
        self._busy = self._samples = 0
        return share * seconds

    def _run(self) -> None:
        main = threading.main_thread().ident
        while not self._stopped.wait(_SECONDS_BETWEEN_SAMPLES):
            frame = sys._current_frames().get(main) if main is not None else None
            if frame is not None:
                self._samples += 1
                self._busy += waits_for_ranks(frame) is None
