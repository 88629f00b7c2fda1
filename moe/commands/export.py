"""`moe export` and `moe import`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.common import JsonOption, say

DtypeOption = Annotated[str, typer.Option(help="Of the weights: keep, fp32, bf16 or fp16.")]
ShardOption = Annotated[float, typer.Option(min=1e-6, help="Largest weights file in GB.")]
VerifyOption = Annotated[
    bool, typer.Option(help="Load what was written and compare logits; needs memory for a whole model in fp32.")
]
TextOption = Annotated[Path | None, typer.Option(help="Text for the comparison; by default a short one of our own.")]
# Of the most likely tokens: llama.cpp's arithmetic and quantized weights change some, a wrong architecture nearly all.
LEAST_AGREEMENT = 0.8


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a model, ours or of a stock architecture.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a file for gguf.")],
    to: Annotated[str, typer.Option(help="mixtral, qwen2_moe, qwen3_moe, glm4_moe, or gguf.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: keep, fp32, bf16 or fp16; for gguf also q8_0.")] = "keep",
    shard_gb: ShardOption = 5.0,
    no_vocabulary: Annotated[
        bool, typer.Option("--no-vocabulary", help="For gguf: leave out a tokenizer that llama.cpp does not have.")
    ] = False,
    verify: VerifyOption = True,
    verify_text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model so that transformers, vLLM or llama.cpp load it without our code.

    What the architecture cannot express is an error that names it. The written folder is loaded by transformers alone, and its
    logits are compared with the model's before the folder gets its name. A GGUF file is read back and compared before it
    gets its name, and run where llama-cpp-python is installed.

    Example: `moe export runs/tiny/model tiny-mixtral --to mixtral --dtype bf16`
    """
    text = _text(verify_text)
    if to == "gguf":
        _report(_write_gguf(model, out, dtype, no_vocabulary, verify, text), as_json)
    else:
        _report(_write(model, out, to, dtype, shard_gb, verify, text), as_json)


def import_model(
    source: Annotated[Path, typer.Argument(help="Folder of a stock architecture.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: DtypeOption = "keep",
    shard_gb: ShardOption = 5.0,
    verify: VerifyOption = True,
    verify_text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a Mixtral, Qwen2-MoE, Qwen3-MoE, GLM4-MoE, OLMoE, dots.llm1 or DeepSeek-V3 folder as a model of ours.

    Example: `moe import OLMoE-1B-7B-0125 olmoe`
    """
    _report(_write(source, out, "moe", dtype, shard_gb, verify, _text(verify_text)), as_json)


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--verify-text {str(path)!r} is not a file")
    return path.read_text(encoding="utf-8", errors="replace")


def _write(
    model: Path, out: Path, to: str, dtype: str, shard_gb: float, verify: bool, text: str | None
) -> dict[str, Any]:
    """Write a folder in a format of `FORMATS`."""
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    from moe.models import verify as verification
    from moe.models.folder import ModelFolder
    from moe.models.stock import FORMATS
    from moe.models.stock.reformat import reformat, source_format
    from moe.models.stock.write import write_model

    hf_logging.disable_progress_bar()
    dtypes = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype!r} is unknown; use one of {', '.join(dtypes)}")
    source = ModelFolder(model)
    conversion = reformat(source)
    notes = (
        FORMATS[to].notes(conversion.config) if to in FORMATS and not FORMATS[to].refusals(conversion.config) else []
    )
    found = []

    def check(folder: Path) -> None:
        far = verification.tolerance(folder, bool(notes))
        windows_BL = verification.text_windows(model, verification.TEXT if text is None else text)
        say(f"comparing logits on {windows_BL.numel()} tokens")
        found.append(verification.measure(model, folder, windows_BL, dtypes[dtype] or torch.float32, far))
        verification.check(found[0], far)

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("writing layers", total=None)
        write_model(
            conversion,
            out,
            to,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            shard_bytes=int(shard_gb * 1e9),
            dtype=dtypes[dtype],
            check=check if verify else None,
        )
    return {
        "model": str(model),
        "out": str(out),
        "from": source_format(source),
        "to": to,
        "rewritten": notes,
        "verified": asdict(found[0]) if found else None,
        "summary": verification.summary(found[0]) if found else "not compared with the source",
    }


def _write_gguf(
    model: Path, out: Path, dtype: str, no_vocabulary: bool, verify: bool, text: str | None
) -> dict[str, Any]:
    """Write a GGUF file, and run it where llama.cpp is installed."""
    import importlib.util
    import math

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from moe.models import verify as verification
    from moe.models.compare import load_folder
    from moe.models.gguf.verify import check_contents, compare_with_llama_cpp
    from moe.models.gguf.write import write_gguf

    dtype = "fp16" if dtype == "keep" else dtype
    result: dict[str, Any] = {"rewritten": [], "verified": None, "summary": "not compared with the source"}

    def check(file: Path) -> None:
        number = check_contents(model, file, dtype)
        result["summary"] = f"{number} tensors are the source's; not run, for lack of llama-cpp-python"
        if importlib.util.find_spec("llama_cpp") is None:
            return
        windows_BL = verification.text_windows(model, verification.TEXT if text is None else text)
        say(f"comparing logits on {windows_BL.numel()} tokens")
        found = compare_with_llama_cpp(load_folder(model, torch.float32), file, windows_BL)
        result["verified"] = asdict(found)
        result["summary"] = f"in llama.cpp: {verification.summary(found)}"
        if found.same_top1 < LEAST_AGREEMENT or math.isnan(found.kl):
            raise ValueError(f"llama.cpp does not compute what the model does; {result['summary']}")

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("writing tensors", total=None)
        written = write_gguf(
            model,
            out,
            dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            no_vocabulary=no_vocabulary,
            check=check if verify else None,
        )
    facts = asdict(written)
    return facts | {"model": str(model), "out": str(facts.pop("path")), "to": "gguf", "dtype": dtype} | result


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for note in result["rewritten"]:
        say(note)
    say(f"wrote {result['out']} ({result['to']}): {result['summary']}")
