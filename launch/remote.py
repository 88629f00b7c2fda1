"""Runs a command on a machine for as long as somebody elsewhere holds its input: ``python -m moe.launch.remote COMMAND ...``

`moe launch` starts this over ssh and keeps its standard input open. When that closes, because the launcher was asked to stop,
died, or lost the connection, the command gets SIGTERM: a training writes its checkpoint and ends. ssh alone would leave it
running.
"""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)

    def stop(number: int = 0, frame: FrameType | None = None) -> None:
        if command.poll() is None:
            command.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)

    def follow() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held by this thread, would abort the interpreter's end
            pass
        stop()

    threading.Thread(target=follow, daemon=True).start()
    status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
