"""What commands share: output, errors, options and loading.

Results for people go to stderr, machine-readable ones (``--json``) to stdout and nothing else there.
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
DtypeOption = Annotated[
    str, typer.Option(help="fp32, bf16, or auto: as the weights are stored, beside packed ones of 4 or 8 bits bf16.")
]
# What `from_pretrained` calls the values of --dtype.
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    print(text, file=sys.stderr)


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show a ValueError as one message and exit with status 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as problem:
            say(f"error: {problem}")
            raise typer.Exit(2) from None

    return wrapper


def read_model(model: str) -> tuple[Any, Any]:
    """Config and tokenizer of a model folder or hub name.

    Raises:
        ValueError: there is no such model, or its config is wrong.
    """
    from transformers import AutoConfig, AutoTokenizer

    import moe.models  # noqa: F401  (registers our architecture)

    if not (Path(model) / "config.json").is_file() and (Path(model).exists() or model.count("/") > 1):
        raise ValueError(
            f"model folder {model!r} has no config.json; give the folder that `moe train` wrote, RUN/model"
        )
    try:
        return AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except OSError as problem:
        raise ValueError(f"model {model!r} cannot be loaded: {problem}") from None


def load_model(model: str, device: str, dtype: str = "auto") -> Any:
    """The causal language model of a folder or hub name, in eval mode; a line says so where it is quantised.

    Args:
        model: the folder or name.
        device: "cpu", "cuda" or "auto".
        dtype: a key of `DTYPES`.

    Raises:
        ValueError: it cannot be loaded, weights are missing or have another shape, or an option is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    import moe.models  # noqa: F401  (registers our architecture)
    from moe.quant.runtime.open import open_quantized

    hf_logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    chosen = choose_device(device)
    opened = open_quantized(model, chosen, None if dtype == "auto" else getattr(torch, DTYPES[dtype]))
    if opened is not None:
        say(opened.note)
        return opened.model
    auto: Any = AutoModelForCausalLM  # its annotation knows no loading info
    try:
        loaded, found = auto.from_pretrained(model, dtype=DTYPES[dtype], output_loading_info=True)
    except OSError as problem:
        raise ValueError(f"model {model!r} cannot be loaded: {problem}") from None
    if wrong := sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind]):
        raise ValueError(f"model {model!r} lacks {len(wrong)} weights or has them in another shape: {wrong[:3]}")
    return loaded.to(chosen).eval()


def choose_device(device: str) -> str:
    """The device that --device means here, "cpu" or "cuda".

    Raises:
        ValueError: it is not on this machine.
    """
    import torch

    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in (*here, "auto"):
        raise ValueError(f"--device {device!r} is not here; use {', '.join(here)} or auto")
    return here[-1] if device == "auto" else device
