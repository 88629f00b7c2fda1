"""`moe doctor`."""

import json

import typer

from moe.commands.common import JsonOption


def doctor(as_json: JsonOption = False) -> None:
    """Show devices, versions, kernels and collectives; run every router, and check expert-parallel gradients, on this machine.

    Example: `moe doctor`
    """
    from moe.launch.doctor import examine, render

    findings = examine()
    if as_json:
        print(json.dumps(findings))
    else:
        render(findings)
    if not findings["ok"]:
        raise typer.Exit(1)
