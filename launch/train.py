"""Entry point of one training process: ``torchrun -m moe.launch.train CONFIG [--resume] [key=value ...]``.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from whoever starts it: torchrun, the deepspeed launcher,
srun, or `moe train`. Without them it is a run of one process. One that its launcher starts again after a failure resumes.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from moe.launch.env import choose_device, end_with_launcher, free_port, was_restarted
from moe.train.config import RunConfig, load_config
from moe.train.run_folder import check_run_dir

if TYPE_CHECKING:
    from moe.parallel.ranks import Ranks


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    parser = argparse.ArgumentParser(prog="moe.launch.train", description=__doc__)
    parser.add_argument("config", help="YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    options = parser.parse_intermixed_args(arguments)
    end_with_launcher()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    try:
        config = load_config(options.config, options.overrides)
        return train(config, options.resume or was_restarted())
    except ValueError as problem:
        if os.environ["RANK"] == "0":
            print(f"error: {problem}", file=sys.stderr)
        return 2


def train(config: RunConfig, resume: bool) -> int:
    """Join the other ranks and train; returns the exit status."""
    from moe.parallel.ranks import init_ranks, leave

    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    device_type = choose_device(config.parallel, local_processes)
    ranks = init_ranks(device_type, config.parallel.timeout_seconds)
    try:
        return run(config, ranks, resume)
    finally:
        leave()


def run(config: RunConfig, ranks: "Ranks", resume: bool) -> int:
    """Run the trainer on this rank, then write summary, model folder and report on rank 0; returns the exit status."""
    from moe.train.finish import finish_run
    from moe.train.trainer import Trainer, TrainingError

    problem = None
    if ranks.is_main:
        try:
            check_run_dir(config.run_dir, resume)
        except ValueError as found:
            problem = str(found)
    if problem := ranks.gather(problem)[0]:
        raise ValueError(problem)
    try:
        trainer = Trainer(config, ranks, resume)
        outcome = trainer.fit()
    except TrainingError as problem_found:
        if ranks.is_main:
            print(f"error: {problem_found}", file=sys.stderr)
        return 3
    if ranks.is_main:
        finish_run(config, outcome, trainer.data.tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
