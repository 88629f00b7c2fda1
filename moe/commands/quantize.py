"""`moe quantize`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.common import DeviceOption, JsonOption, choose_device, say

DEFAULT_WINDOW = 2048


def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of an MoE model, ours or of a stock architecture.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a file for gguf.")],
    scheme: Annotated[str, typer.Option(help="w8a16, w4a16, w3a16, w8a8, w4a8, fp8, mxfp4, w4a4 or w3a4.")],
    method: Annotated[
        str,
        typer.Option(
            help="A rounding (rtn, clip, gptq), a scaling (smoothquant, awq, eaquant), or both, as in eaquant+gptq."
        ),
    ] = "gptq",
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text file; may be repeated, each gives its equal part.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration text.")] = 65536,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window of text; by default 2048, or what the model takes.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale, 0 for a whole row; by default the scheme's.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Architecture of the result; by default the model's own, or one that fits.")
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="compressed-tensors, gguf or simulated; by default the scheme's first.")
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Calibrate each expert on this many times its fair share at least; by default the method's."
        ),
    ] = None,
    affinity: Annotated[
        bool, typer.Option("--affinity", help="gptq: tokens count by their weight in an expert (MoEQuant).")
    ] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="w4a4, w3a4: round inputs and weights rotated by Hadamard matrices.")
    ] = False,
    evaluate: Annotated[
        Path | None,
        typer.Option("--eval", help="Text for perplexities; the last fifth where it is a calibration file as well."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of it, at most.")] = 8,
    verify: Annotated[
        bool, typer.Option(help="Load what was written and compare logits; needs memory for a whole model in fp32.")
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again where an earlier run was interrupted.")
    ] = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of text.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Quantize a Mixture-of-Experts model for serving, layer by layer.

    Memory is that of one layer and of the text's activations. What is finished is kept in OUT.quantizing, so the same command goes
    on after an interruption. What each scheme runs in is in docs/quantization.md.

    Example: `moe quantize OLMoE olmoe-w4a16 --scheme w4a16 --method eaquant+gptq --calibration wiki.txt`
    """
    from transformers.utils import logging as hf_logging

    from moe.models.folder import ModelFolder
    from moe.quant.card import describe
    from moe.quant.options import QuantOptions, parse_method
    from moe.quant.plan import make_plan
    from moe.quant.run import CalibrationText
    from moe.quant.schemes import GGUF

    hf_logging.disable_progress_bar()
    device = choose_device(device)
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another name")
    if to == GGUF:  # as `moe export` has it
        to, container = None, GGUF
    chosen = parse_method(method, scheme)
    options = QuantOptions(
        scheme=scheme,
        group_size=group_size,
        scaling=chosen.scaling,
        rounding=chosen.rounding,
        balance=chosen.balance if balance is None else balance,
        align_router=chosen.align_router,
        affinity=affinity,
        rotate=rotate,
        seed=seed,
    )
    plan = make_plan(ModelFolder(source), options, to, container)
    window = _window(plan, window)
    text = _read_text(plan, calibration or [], tokens, window, evaluate, eval_windows)
    command = ["moe", "quantize", str(source), str(out), *_flags(locals())]
    for note in plan.rewritten:
        say(note)

    def check(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if verify and plan.container.name != GGUF:
            found["verification"] = _verify(folder)
        if text.evaluation_BL is not None:
            found["perplexity"] = _perplexities(source, folder, text.evaluation_BL, device)
        return found

    report = _run(
        plan,
        out,
        CalibrationText(windows_BL=text.calibration_BL, reserve_BL=text.reserve_BL),
        {"device": device, "restart": restart},
        check=check,
        check_file=lambda folder, file: {"verification": _verify_gguf(folder, file)} if verify else {},
        describe=lambda report: describe(report, plan, out.name, command),
    )
    for line in report.table():
        say(line)
    share = report.bytes_after / report.bytes_before
    say(f"wrote {out} ({plan.target.to}, {plan.container.name}, {options.scheme}): {share:.0%} of the source's bytes")
    if as_json:
        print(json.dumps({"model": str(out), "to": plan.target.to, "container": plan.container.name, **asdict(report)}))


def _window(plan: Any, window: int | None) -> int:
    """Tokens of a window, no more than the model has positions."""
    from moe.models.stock.decoder import decoder_config

    limit = decoder_config(plan.target.config).max_position_embeddings
    if window is not None and window > limit:
        raise ValueError(f"--window {window} is more than the {limit} positions of the model; use --window {limit}")
    return min(DEFAULT_WINDOW, limit) if window is None else window


def _read_text(plan: Any, files: list[Path], tokens: int, window: int, evaluate: Path | None, eval_windows: int) -> Any:
    """Calibration text, its reserve, and evaluation text."""
    from transformers import AutoTokenizer

    from moe.models.calibration_text import CalibrationWindows, read_text, read_windows, tokenize
    from moe.models.evaluate import cut_windows
    from moe.models.verify import text_windows

    options, folder = plan.options, plan.source.path
    if files:
        reserve = int(options.balance * tokens)
        return read_windows(folder, files, tokens, window, evaluate, eval_windows, options.seed, reserve)
    if options.scaling is not None or options.rounding != "rtn":
        raise ValueError("--calibration is not given; this method needs text: name a file, or use --method rtn")
    # Round-to-nearest looks at no text; errors are measured on a short one of our own.
    calibration_BL = text_windows(folder)
    if evaluate is None:
        return CalibrationWindows(calibration_BL=calibration_BL, evaluation_BL=None)
    ids = tokenize(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), read_text(evaluate))
    return CalibrationWindows(calibration_BL=calibration_BL, evaluation_BL=cut_windows(ids, window, eval_windows))


def _run(plan: Any, out: Path, text: Any, how: dict[str, Any], **callbacks: Any) -> Any:
    """Quantise under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moe.models.stock.decoder import decoder_config
    from moe.quant.run import Callbacks
    from moe.quant.run import quantize as run

    num_layers = decoder_config(plan.target.config).num_hidden_layers
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("layers", total=num_layers)
        heard = Callbacks(
            layer=lambda report: bar.update(task, completed=report.layer + 1),
            matrix=lambda layer, name: bar.update(task, description=f"layer {layer}: {name}"),
            **callbacks,
        )
        return run(plan, out, text, callbacks=heard, **how)


def _flags(values: dict[str, Any]) -> list[str]:
    """Words of the command's options that make the model again."""
    words = ["--scheme", values["scheme"], "--method", values["method"]]
    words += [word for file in values["calibration"] or [] for word in ("--calibration", str(file))]
    for name in ("tokens", "window", "group_size", "to", "container", "balance", "seed"):
        if values[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(values[name])]
    if values["evaluate"] is not None:  # decides which part of a file calibrates
        words += ["--eval", str(values["evaluate"])]
    switches = {
        "--affinity": values["affinity"],
        "--rotate": values["rotate"],
    }
    return [*words, *(word for word, is_on in switches.items() if is_on)]


def _verify(folder: Path) -> dict[str, Any]:
    """Load what was written with stock software, where that can."""
    from moe.models.verify import summary, text_windows
    from moe.quant.verify import verify_folder

    say("verifying the folder")
    found = verify_folder(folder, text_windows(folder))
    if found.logits is None:
        say(f"{found.num_tensors} tensors are sound")
    else:
        say(f"{found.num_tensors} tensors are sound; in {found.loaded_by}: {summary(found.logits)}")
    return asdict(found)


def _verify_gguf(folder: Path, file: Path) -> dict[str, Any]:
    """Read the file back, and run it in llama.cpp."""
    from moe.models.verify import summary, text_windows
    from moe.quant.verify_gguf import verify_gguf

    say("verifying the file")
    found = verify_gguf(folder, file, text_windows(folder))
    say(f"in llama.cpp: {summary(found)}")
    return {"loaded_by": "llama.cpp", "logits": asdict(found)}


def _perplexities(source: Path, out: Path, windows_BL: Any, device: str) -> dict[str, float]:
    """Of the source and of the quantised model, one after the other."""
    import torch

    from moe.models.compare import load_folder
    from moe.models.evaluate import perplexity
    from moe.quant.load import load_simulated

    say(f"measuring perplexities on {windows_BL.numel()} tokens")
    before = perplexity(load_folder(source, torch.float32, device), windows_BL, batch_size=1)
    quantized: Any = load_simulated(out)
    after = perplexity(quantized.to(device), windows_BL, batch_size=1)["perplexity"]
    say(f"perplexity {before['perplexity']:.3f} before, {after:.3f} after")
    return {"before": before["perplexity"], "after": after, "tokens": before["tokens"]}
