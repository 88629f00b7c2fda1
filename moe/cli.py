"""The `moe` command: which commands there are. What they do is in `moe/commands`, one file each."""

import os
from collections.abc import Callable

import typer

from moe.commands import (
    carve,
    checkpoint,
    doctor,
    evaluate,
    export,
    fetch_demo,
    generate,
    launch,
    laws,
    mup,
    plan,
    quantize,
    recover,
    report,
    tomoe,
    trace,
    train,
    upcycle,
)
from moe.commands.common import user_errors

# In the order of `moe --help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "launch": launch.launch,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "report": report.report,
    "doctor": doctor.doctor,
    "plan": plan.plan,
    "trace": trace.trace,
    "fetch-demo": fetch_demo.fetch_demo,
    "upcycle": upcycle.upcycle,
    "carve": carve.carve,
    "tomoe": tomoe.tomoe,
    "recover": recover.recover,
    "quantize": quantize.quantize,
    "export": export.export,
    "import": export.import_model,
}
CHECKPOINT_COMMANDS: dict[str, Callable[..., None]] = {
    "list": checkpoint.list_checkpoints,
    "verify": checkpoint.verify_checkpoint,
    "export": checkpoint.export_checkpoint,
}
LAWS_COMMANDS: dict[str, Callable[..., None]] = {"fit": laws.fit, "predict": laws.predict}
MUP_COMMANDS: dict[str, Callable[..., None]] = {"check": mup.check, "sweep": mup.sweep}


def make_app(name: str, help_text: str, commands: dict[str, Callable[..., None]]) -> typer.Typer:
    """A command whose subcommands are ``commands``; a ValueError of theirs is a user's mistake."""
    made = typer.Typer(
        name=name,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    for command_name, command in commands.items():
        made.command(command_name)(user_errors(command))
    return made


app = make_app("moe", "Make, train, convert and ship Mixture-of-Experts language models.", COMMANDS)
app.add_typer(make_app("checkpoint", "List, check and export training checkpoints.", CHECKPOINT_COMMANDS))
app.add_typer(make_app("mup", "Check that hyper-parameters carry over to other widths.", MUP_COMMANDS))
app.add_typer(make_app("laws", "Fit scaling laws to runs, and predict losses.", LAWS_COMMANDS))


def main() -> None:
    """Entry point of the `moe` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    app()


if __name__ == "__main__":
    main()
