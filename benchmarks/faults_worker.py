"""A training process in which one rank stalls as planned; for the benchmark `faults`.

``python -m benchmarks.faults_worker launch PLAN CONFIG ...`` starts two of them (`run_local`), and again after each stall. The
plan is a JSON list: the stall of the first start, of the second, and so on; after the last one the run goes to its end.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAN_VARIABLE = "MOE_FAULTS_PLAN"
# Where a rank can be caught: the phase that the watchdog must name, and the method that does not return.
PLACES = {
    "data": ("loading the batch", "moe.train.data", "BatchLoader", "next_step"),
    "router": ("forward", "moe.routers.topk", "TopKRouter", "forward"),
    "experts": ("forward", "moe.experts", "ExpertBank", "forward"),
    "optimizer": ("optimizer step", "moe.parallel.engine", "Engine", "step"),
}
MANNERS = ("sleep", "stop")


def began_file(plan: Path, index: int) -> Path:
    """Written when stall ``index`` begins; holds the time."""
    return plan.with_name(f"began-{index}")


def _install(plan: Path) -> None:
    index = int(os.environ["MOE_RESTARTS"])
    stalls = json.loads(plan.read_text(encoding="utf-8"))
    if index >= len(stalls) or int(os.environ["RANK"]) != stalls[index]["rank"]:
        return
    stall = stalls[index]
    module, owner, method = PLACES[stall["place"]][1:]
    steps = 0

    def begin() -> None:
        partial = plan.with_name(f".began-{index}")
        partial.write_text(str(time.time()), encoding="utf-8")
        partial.rename(began_file(plan, index))
        if stall["manner"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)

    def counted() -> None:
        nonlocal steps
        steps += 1

    from moe.train.trainer import Trainer

    _before(Trainer, "_train_step", counted)
    target = getattr(sys.modules.get(module) or __import__(module, fromlist=[owner]), owner)
    # Not in evaluations, which come before or after all steps of a start and have another limit.
    _before(target, method, lambda: begin() if steps > stall["after_steps"] else None)


def _before(owner: Any, method: str, act: Callable[[], None]) -> None:
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        act()
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def main(arguments: list[str]) -> int:
    if arguments[0] == "launch":
        from moe.launch.local import run_local

        plan = Path(arguments[1])
        os.environ[PLAN_VARIABLE] = str(plan)
        num_stalls = len(json.loads(plan.read_text(encoding="utf-8")))
        return run_local(arguments[2:], 2, module="benchmarks.faults_worker", max_restarts=num_stalls)
    from moe.launch.train import main as train

    _install(Path(os.environ[PLAN_VARIABLE]))
    return train(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
