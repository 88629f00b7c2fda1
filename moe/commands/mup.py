"""`moe mup check`, `moe mup sweep`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption

ConfigArgument = Annotated[Path, typer.Argument(help="YAML recipe, such as configs/tiny-mup.yaml.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")]


def _values(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers such as 128,256,512") from None


def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    widths: Annotated[str | None, typer.Option(help="Hidden sizes to compare, such as 128,256,512.")] = None,
    experts: Annotated[str | None, typer.Option(help="Numbers of experts to compare instead.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Granularities to compare instead.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations to average over.")] = 3,
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

    asked = {"width": widths, "experts": experts, "granularity": granularity}
    chosen = {axis: text for axis, text in asked.items() if text is not None} or {"width": "128,256,512"}
    if len(chosen) > 1:
        raise ValueError(f"compare one thing at a time, not {' and '.join(chosen)}")
    ((axis, text),) = chosen.items()
    options = CheckOptions(axis=axis, values=_values(text, f"--{axis}"), num_steps=steps, num_seeds=seeds, lr=lr)
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
