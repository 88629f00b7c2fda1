"""`moe train`."""

from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say


def train(
    config: Annotated[Path, typer.Argument(help="YAML recipe, such as configs/tiny.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in its folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on this machine's processes.

    Example: `moe train configs/tiny.yaml train.steps=100 moe.router.top_k=1 name=short`

    Under torchrun, the deepspeed launcher or srun, use `-m moe.launch.train` with the same arguments instead.
    """
    from moe.launch.env import choose_device, choose_processes
    from moe.launch.local import run_local
    from moe.train.config import load_config
    from moe.train.run_folder import SUMMARY_FILE, check_run_dir

    run = load_config(config, overrides)
    check_run_dir(run.run_dir, resume)
    processes = choose_processes(run.parallel)
    choose_device(run.parallel, processes)
    run.grad_accum(processes)
    say(f"{run.name}: {processes} process{'es' if processes > 1 else ''}, run folder {run.run_dir}")
    arguments = [str(config), *(overrides or []), *(["--resume"] if resume else [])]
    status = run_local(arguments, processes, max_restarts=run.parallel.max_restarts)
    if status:
        raise typer.Exit(status)
    if as_json:
        print((run.run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
