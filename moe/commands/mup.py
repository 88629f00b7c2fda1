"""`moe mup check`, `moe mup sweep`."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say

ConfigArgument = Annotated[Path, typer.Argument(help="YAML recipe, such as configs/tiny-mup.yaml.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")]

WidthsOption = Annotated[str | None, typer.Option(help="Hidden sizes to compare; 128,256,512 if nothing is said.")]
ExpertsOption = Annotated[str | None, typer.Option(help="Numbers of experts to compare instead, such as 4,8,16.")]
GranularityOption = Annotated[str | None, typer.Option(help="Granularities to compare instead, such as 1,2,4.")]


def _values(axis: str, text: str) -> tuple[int, ...]:
    from moe.train.mup.variants import EXAMPLES, OPTIONS

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{OPTIONS[axis]} {text!r} must be whole numbers, such as {EXAMPLES[axis]}") from None


def _axis(widths: str | None, experts: str | None, granularity: str | None) -> tuple[str, tuple[int, ...]]:
    """What is compared, and its values."""
    asked = {"width": widths, "experts": experts, "granularity": granularity}
    chosen = {axis: text for axis, text in asked.items() if text is not None} or {"width": "128,256,512"}
    if len(chosen) > 1:
        raise ValueError(f"compare one thing at a time, not {' and '.join(chosen)}; run the command once for each")
    ((axis, text),) = chosen.items()
    return axis, _values(axis, text)


def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    widths: WidthsOption = None,
    experts: ExpertsOption = None,
    granularity: GranularityOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations to average over.")] = 3,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text (data.seq_len) in a batch.")] = 4,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default the recipe's.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Coordinate check: sizes of every module's output and of its change must not depend on the width. Exit status 1 if they do.

    Example: `moe mup check configs/tiny-mup.yaml --widths 128,256,512`
    """
    from rich.console import Console
    from rich.progress import Progress

    from moe.train.config import load_config
    from moe.train.mup.check import CheckOptions, run_check
    from moe.train.mup.render import draw_check, render_check

    axis, values = _axis(widths, experts, granularity)
    options = CheckOptions(axis=axis, values=values, num_steps=steps, num_seeds=seeds, num_windows=windows, lr=lr)
    console = Console(stderr=True)
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        run = load_config(config, overrides)
        result = run_check(run, options, lambda done, total: bar.update(task, completed=done, total=total))
    if picture is not None:
        draw_check([result], picture)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        render_check(result, console)
    if result.failed:
        raise typer.Exit(1)


def sweep(
    config: ConfigArgument,
    folder: Annotated[Path, typer.Argument(help="Folder for the runs; one that was begun is continued.")],
    overrides: OverridesArgument = None,
    widths: WidthsOption = None,
    experts: ExpertsOption = None,
    granularity: GranularityOption = None,
    lr: Annotated[str, typer.Option(help="Learning rates.")] = "3.75e-4,7.5e-4,1.5e-3,3e-3,6e-3,1.2e-2,2.4e-2",
    seeds: Annotated[int, typer.Option(min=1, help="Runs for each learning rate.")] = 2,
    picture: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe at several widths and learning rates, and show where the best rate is and how far it moves.

    Example: `moe mup sweep configs/tiny-mup.yaml runs/sweep --widths 64,128,256`
    """
    from dataclasses import asdict

    from rich.console import Console

    from moe.train.config import load_config
    from moe.train.mup.render import draw_sweeps, render_sweep
    from moe.train.mup.sweep import SweepOptions, optima, run_sweep, shift

    axis, values = _axis(widths, experts, granularity)
    try:
        rates = tuple(float(part) for part in lr.split(","))
    except ValueError:
        raise ValueError(f"--lr {lr!r} must be numbers such as 1e-3,2e-3,4e-3") from None
    options = SweepOptions(axis=axis, values=values, learning_rates=rates, seeds=tuple(range(seeds)))
    run = load_config(config, overrides)
    runs = run_sweep(run, options, folder, say)
    if picture is not None:
        draw_sweeps({run.parametrization.name: runs}, axis, picture)
    if as_json:
        found = optima(runs)
        losses = [asdict(run) | ({} if math.isfinite(run.eval_loss) else {"eval_loss": None}) for run in runs]
        print(json.dumps({"runs": losses, "optima": list(map(asdict, found)), "shift": shift(found)}))
    else:
        render_sweep(runs, axis, Console(stderr=True))
