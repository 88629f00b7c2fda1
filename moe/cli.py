"""The `moe` command.

Results for people go to stderr, machine-readable ones (``--json``) to stdout and nothing else there.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="moe",
    help="Make, train, convert and ship Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show a ValueError as one message and exit with status 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as problem:
            _say(f"error: {problem}")
            raise typer.Exit(2) from None

    return wrapper


@app.command()
@user_errors
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
    _say(f"{run.name}: {processes} process{'es' if processes > 1 else ''}, run folder {run.run_dir}")
    status = run_local([str(config), *(overrides or []), *(["--resume"] if resume else [])], processes)
    if status:
        raise typer.Exit(status)
    if as_json:
        print((run.run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))


def _load(model: str, device: str) -> tuple[Any, Any]:
    """Model in eval mode and its tokenizer from a folder or hub name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    import moe.models  # noqa: F401  (registers our architecture)

    hf_logging.disable_progress_bar()
    if not (Path(model) / "config.json").is_file() and (Path(model).exists() or model.count("/") > 1):
        raise ValueError(
            f"model folder {model!r} has no config.json; give the folder that `moe train` wrote, RUN/model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except OSError as problem:
        raise ValueError(f"model {model!r} cannot be loaded: {problem}") from None
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"--device {device!r} is not here; use cpu{', cuda' if torch.cuda.is_available() else ''} or auto"
        )
    return loaded.to(chosen).eval(), tokenizer


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]


@app.command("eval")
@user_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[Path, typer.Option(help="Text file to evaluate on.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model on a text file, in consecutive windows.

    Example: `moe eval runs/tiny/model --text notes.txt --window 256 --json`
    """
    from rich.console import Console
    from rich.progress import Progress

    from moe.models.evaluate import cut_windows, perplexity

    if not text.is_file():
        raise ValueError(f"--text {str(text)!r} is not a file")
    loaded, tokenizer = _load(model, device)
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", window)
    if window > longest:
        raise ValueError(f"--window {window} is longer than the model's {longest} positions; lower it")
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
    windows = cut_windows(ids, window, max_windows)
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("evaluating", total=len(windows))
        result = perplexity(loaded, windows, lambda done, total: bar.update(task, completed=done))
    result = {"model": model, "text": str(text), "window": window, **result}
    if as_json:
        print(json.dumps(result))
    else:
        _say(f"perplexity {result['perplexity']:.3f}, loss {result['loss']:.4f} over {result['tokens']} tokens")


@app.command()
@user_errors
def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text goes to stdout.

    Example: `moe generate runs/tiny/model --prompt "def main(" --temperature 0.8`
    """
    import torch

    from moe.models.generate import sample_text

    loaded, tokenizer = _load(model, device)
    torch.manual_seed(seed)
    output = sample_text(loaded, tokenizer, prompt, max_new_tokens, temperature)
    print(json.dumps({"model": model, "prompt": prompt, "text": output}) if as_json else output)


@app.command()
@user_errors
def report(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonOption = False) -> None:
    """Write a run's HTML page and pictures.

    Example: `moe report runs/tiny`
    """
    from moe.train.report import PICTURES_DIR, write_report

    page = write_report(run)
    if as_json:
        print(json.dumps({"report": str(page), "pictures": str(run / PICTURES_DIR)}))
    else:
        _say(f"wrote {page} and {run / PICTURES_DIR}")


@app.command()
@user_errors
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


def main() -> None:
    """Entry point of the `moe` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    app()


if __name__ == "__main__":
    main()
