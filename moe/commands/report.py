"""`moe report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say


def report(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonOption = False) -> None:
    """Write a run's HTML page and pictures.

    Example: `moe report runs/tiny`
    """
    from moe.train.report import PICTURES_DIR, write_report

    page = write_report(run)
    if as_json:
        print(json.dumps({"report": str(page), "pictures": str(run / PICTURES_DIR)}))
    else:
        say(f"wrote {page} and {run / PICTURES_DIR}")
