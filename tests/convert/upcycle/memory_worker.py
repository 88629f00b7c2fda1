"""Upcycles in a process of its own and prints how much memory that took.

``anonymous`` is what the process allocated; ``mapped`` are pages of the source's files, which the kernel may take back at any time;
``peak`` is the largest sum of both, as the kernel counts it (``VmHWM``; ``ru_maxrss`` begins at the parent's).
"""

import json
import sys
import threading
from pathlib import Path

import torch

from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle


def status() -> dict[str, int]:
    """Bytes by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmHWM"))}


def main(source: str, out: str, options: str) -> None:
    torch.set_num_threads(1)
    before = status()
    highest = dict(before)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            for name, value in status().items():
                highest[name] = max(highest[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    upcycle([Path(source)], Path(out), UpcycleOptions(**json.loads(options)), verify=False)
    stop.set()
    watcher.join()
    found = {
        "before": before["RssAnon"] + before["RssFile"],
        "anonymous": highest["RssAnon"] - before["RssAnon"],
        "mapped": highest["RssFile"] - before["RssFile"],
        "peak": status()["VmHWM"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
