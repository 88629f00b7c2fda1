"""`moe eval`: a model on a text, on tasks, or beside another model."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    load_model,
    read_model,
    say,
)

FOR_TASKS, FOR_COMPARE = "With --tasks", "With --compare"
DEFAULT_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Placing:
    """Where and in which dtype a model runs."""

    device: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """A text file and how it is cut into windows."""

    file: Path
    window: int | None
    max_windows: int | None

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise ValueError(f"--text {str(self.file)!r} is not a file")

    def cut(self, *models: str) -> Any:
        """Windows (B, L) of token ids, of a length that all the models take.

        Raises:
            ValueError: the window is too long for one of them, or their tokenizers differ on the text.
        """
        from moe.models.evaluate import cut_windows

        text = self.file.read_text(encoding="utf-8", errors="replace")
        longest, ids_of = math.inf, {}
        for model in models:
            config, tokenizer = read_model(model)
            ids_of[model] = tokenizer(text, add_special_tokens=False)["input_ids"]
            longest = min(longest, getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf)
        token_ids = ids_of[models[0]]
        for model in models[1:]:
            if ids_of[model] != token_ids:
                raise ValueError(
                    f"{models[0]!r} and {model!r} make different tokens of {str(self.file)!r}; compare models that "
                    "have the same tokenizer"
                )
        if self.window is not None and self.window > longest:
            raise ValueError(f"--window {self.window} is longer than the model's {longest} positions; lower it")
        return cut_windows(token_ids, self.window or int(min(DEFAULT_WINDOW, longest)), self.max_windows)


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness and how they are asked."""

    where: str
    online: bool
    limit: int | None
    num_fewshot: int | None


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[Path | None, typer.Option(help="Text file to evaluate on, in consecutive windows.")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window; 1024 or what the model takes, if that is less.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness: a YAML file, FOLDER or FOLDER,NAME,NAME.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only a task's first questions.", rich_help_panel=FOR_TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before a question.", rich_help_panel=FOR_TASKS)
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Let tasks fetch data sets from the hub.", rich_help_panel=FOR_TASKS)
    ] = False,
    compare: Annotated[str | None, typer.Option(help="A reference: tell how far from it MODEL is on the text.")] = None,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Hold one model in memory, and the other's logits in a temporary file.",
            rich_help_panel=FOR_COMPARE,
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows at a time, 4; or requests of tasks, 1.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity on a text, accuracy on tasks, or the distance from another model.

    Example: `moe eval runs/tiny/model --text notes.txt --json`

    Example: `moe eval runs/tiny/model --tasks configs/eval/capitals.yaml --num-fewshot 2`

    Example: `moe eval carved --compare dense --text notes.txt --max-windows 16`
    """
    if (text is None) == (tasks is None):
        raise ValueError("give one of --text FILE and --tasks FILE_OR_FOLDER")
    useless = {
        "--limit": limit is not None and tasks is None,
        "--num-fewshot": num_fewshot is not None and tasks is None,
        "--online": online and tasks is None,
        "--window": window is not None and text is None,
        "--max-windows": max_windows is not None and text is None,
        "--compare": compare is not None and text is None,
        "--one-at-a-time": one_at_a_time and compare is None,
        "--batch-size": batch_size is not None and compare is not None,
    }
    if wrong := [name for name, is_useless in useless.items() if is_useless]:
        raise ValueError(f"{', '.join(wrong)} would do nothing here; see `moe eval --help`")
    placing = Placing(device, dtype)
    if tasks is not None:
        result, summary = _on_tasks(placing, model, TaskOptions(tasks, online, limit, num_fewshot), batch_size or 1)
    else:
        assert text is not None
        options = TextOptions(text, window, max_windows)
        if compare is None:
            result, summary = _on_text(placing, model, options, batch_size or 4)
        else:
            result, summary = _compared(placing, compare, model, options, one_at_a_time)
    if as_json:
        print(json.dumps({"model": model, **result}))
    else:
        say(summary)


def _on_text(placing: Placing, model: str, text: TextOptions, batch_size: int) -> tuple[dict[str, Any], str]:
    """What is found, for JSON and for people."""
    from moe.models.evaluate import perplexity

    windows_BL = text.cut(model)
    loaded = load_model(model, placing.device, placing.dtype)
    with _progress() as tell:
        found = perplexity(loaded, windows_BL, tell, batch_size)
    summary = f"perplexity {found['perplexity']:.3f}, loss {found['loss']:.4f} over {found['tokens']} tokens"
    return {"text": str(text.file), "window": windows_BL.shape[1], **found}, summary


def _on_tasks(placing: Placing, model: str, options: TaskOptions, batch_size: int) -> tuple[dict[str, Any], str]:
    from moe.models.lm_eval_tasks import load_tasks, score_tasks

    where, *names = options.where.split(",")
    tasks = load_tasks(Path(where), names, options.online)  # before the model, as it is quicker to find wrong
    _, tokenizer = read_model(model)
    loaded = load_model(model, placing.device, placing.dtype)
    scores = score_tasks(
        loaded, tokenizer, tasks, batch_size=batch_size, limit=options.limit, num_fewshot=options.num_fewshot
    )
    lines = []
    for score in scores:
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        name = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        counts = "" if score.num_samples is None else f", {score.num_samples} questions, {score.num_fewshot}-shot"
        lines.append(f"{score.task}: {name} {score.value:.4f}{error}{counts}")
    return {"scores": [dataclasses.asdict(score) for score in scores]}, "\n".join(lines)


def _compared(
    placing: Placing, reference: str, model: str, text: TextOptions, one_at_a_time: bool
) -> tuple[dict[str, Any], str]:
    from moe.models.compare import LogitsFile, compare_logits, model_logits
    from moe.models.evaluate import perplexity_of

    windows_BL = text.cut(reference, model)
    if one_at_a_time:
        _check_room(reference, windows_BL.numel())
    with _progress() as tell, tempfile.TemporaryDirectory() as scratch:

        def logits(name: str) -> Iterator[Any]:
            return model_logits(load_model(name, placing.device, placing.dtype), windows_BL, tell)

        expected = logits(reference)
        if one_at_a_time:
            stored = LogitsFile(Path(scratch) / "logits", len(windows_BL))
            stored.write(expected)
            expected = stored.windows(windows_BL.shape[1])
        found = compare_logits(expected, logits(model), windows_BL)
    result = {
        "text": str(text.file),
        "window": windows_BL.shape[1],
        "windows": len(windows_BL),
        "tokens": found.tokens,
        "reference": reference,
        "reference_perplexity": perplexity_of(found.reference_loss),
        "perplexity": perplexity_of(found.other_loss),
        "kl": found.kl,
        "kl_p99": found.kl_p99,
        "same_top1": found.same_top1,
        "max_logit_diff": found.max_diff,
        "reference_logit_rms": found.reference_rms,
    }
    summary = (
        f"perplexity {result['perplexity']:.3f}, of the reference {result['reference_perplexity']:.3f}\n"
        f"KL(reference || model) {found.kl:.3g} nats per token, 99th percentile {found.kl_p99:.3g}\n"
        f"same most likely token at {found.same_top1:.2%} of {found.tokens} positions\n"
        f"largest difference of logits {found.max_diff:.3g}, of logits with an RMS of {found.reference_rms:.3g}"
    )
    return result, summary


def _check_room(model: str, num_tokens: int) -> None:
    """Refuse a temporary file of logits that does not fit, before hours go into it."""
    config, _ = read_model(model)
    needed = 4 * num_tokens * config.get_text_config().vocab_size
    folder = tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"--one-at-a-time needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB; lower --max-windows, "
            "or set TMPDIR to a larger place"
        )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while something runs, and the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
