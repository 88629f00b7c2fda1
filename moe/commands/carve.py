"""`moe carve`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.common import JsonOption, say


def carve(
    source: Annotated[Path, typer.Argument(help="Folder of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    calibration: Annotated[list[Path], typer.Option(help="Text file; may be repeated, each gives its equal part.")],
    experts: Annotated[int, typer.Option(help="Experts that an FFN is cut into, shared ones included.")] = 8,
    shared: Annotated[int, typer.Option(help="Of these, experts that every token passes.")] = 2,
    top_k: Annotated[int, typer.Option(help="Routed experts per token.")] = 4,
    method: Annotated[str, typer.Option(help="How neurons are grouped; see docs/carving.md.")] = "best",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration text.")] = 65536,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")] = 2048,
    gate: Annotated[
        str,
        typer.Option(
            help="own, or ridge: a linear gate fitted to the method's experts, as stock architectures need it."
        ),
    ] = "own",
    refit: Annotated[bool, typer.Option(help="Fit the down-projections to what the gates choose.")] = True,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="A layer sees the text as the carved layers below left it.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Run the dense layers in bf16: faster where it has units.")
    ] = False,
    to: Annotated[str, typer.Option(help="Format: moe, or a stock architecture such as glm4_moe.")] = "moe",
    recover_steps: Annotated[
        int, typer.Option(min=0, help="Train the result so many steps, with LoRA and the dense model as teacher.")
    ] = 0,
    evaluate: Annotated[
        Path | None,
        typer.Option("--eval", help="Text for perplexities; the last fifth where it is a calibration file as well."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of it, at most.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    verify: Annotated[
        bool, typer.Option(help="Compare logits with the source's; needs memory for a whole model in fp32.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Cut the FFNs of a dense model into shared and routed experts, so that fewer of its neurons run per token.

    Nothing is trained, except by --recover-steps: the experts come from how neurons react to the calibration text.
    `moe recover` has more settings for the training; `moe tomoe` is the method that trains masks.

    Example: `moe carve SmolLM2-135M smol-moe --calibration wiki.txt --shared 2 --top-k 4 --to glm4_moe`
    """
    from transformers.utils import logging as hf_logging

    from moe.convert.carve.card import describe
    from moe.convert.carve.options import CarveOptions
    from moe.convert.carve.recovered import carve_and_recover
    from moe.convert.carve.run import LayerReport, carved_config, check_format
    from moe.convert.carve.run import carve as run
    from moe.convert.carve.types import CarveShape
    from moe.convert.recover import Point, RecoverOptions
    from moe.models.calibration_text import read_windows
    from moe.models.folder import ModelFolder

    hf_logging.disable_progress_bar()
    options = CarveOptions(
        shape=CarveShape(num_experts=experts, num_shared=shared, top_k=top_k),
        method=method,
        gate=gate,  # type: ignore[arg-type]  # checked there
        refit=refit,
        sequential=sequential,
        bf16=bf16,
        seed=seed,
    )
    dense = ModelFolder(source)
    check_format(carved_config(dense, options), options, to)  # before the text is read
    text = read_windows(source, calibration, tokens, window, evaluate, eval_windows, seed)
    command = ["moe", "carve", str(source), str(out), *_flags(locals())]

    def report(layer: LayerReport) -> None:
        quality = layer.quality
        say(
            f"layer {layer.layer + 1} of {dense.config.num_hidden_layers}: {quality.energy_kept:.1%} of the output energy kept, "
            f"gate recall {quality.recall:.1%}, {layer.seconds:.1f} s"
        )

    def report_step(point: Point) -> None:
        if point.loss is not None and point.step % 10 == 0:
            say(f"recovery step {point.step} of {recover_steps}: loss {point.loss:.4f}")

    how: dict[str, Any] = {
        "to": to,
        "check_BL": None if not verify else text.calibration_BL if text.evaluation_BL is None else text.evaluation_BL,
        "report": report,
        "describe": lambda carved: describe(carved, dense, options, to, command, f"{tokens} tokens"),
    }
    if recover_steps:
        recover = RecoverOptions(steps=recover_steps, seed=seed, eval_every=0)
        both = carve_and_recover(dense, out, text.calibration_BL, options, recover, report_step=report_step, **how)
        done = both.carved
        say(f"recovery: held-out perplexity {both.recovered.before:.3f} -> {both.recovered.after:.3f}")
    else:
        done = run(dense, out, text.calibration_BL, options, **how)
    result: dict[str, Any] = {
        "model": str(out),
        "active_share": options.shape.active_share,
        "layers": [asdict(layer) for layer in done.layers],
        "comparison": None if done.comparison is None else asdict(done.comparison),
    }
    say(f"wrote {out}: {options.shape.active_share:.0%} of the FFNs' neurons run per token, method {method}")
    if text.evaluation_BL is not None:
        result |= _perplexities(source, out, text.evaluation_BL)
    if as_json:
        print(json.dumps(result))


def _flags(values: dict[str, Any]) -> list[str]:
    """Words of the command's options that make the model again."""
    words = [word for file in values["calibration"] for word in ("--calibration", str(file))]
    for name in ("experts", "shared", "top_k", "method", "tokens", "window", "gate", "to", "seed"):
        words += [f"--{name.replace('_', '-')}", str(values[name])]
    if values["recover_steps"]:
        words += ["--recover-steps", str(values["recover_steps"])]
    if values["evaluate"] is not None:  # decides which part of a file calibrates
        words += ["--eval", str(values["evaluate"])]
    words.append("--refit" if values["refit"] else "--no-refit")
    return [*words, *(f"--{name}" for name in ("sequential", "bf16") if values[name])]


def _perplexities(source: Path, out: Path, windows_BL: Any) -> dict[str, float]:
    """Of the dense and of the carved model, one after the other."""
    from rich.console import Console
    from rich.progress import Progress

    from moe.models.compare import load_folder
    from moe.models.evaluate import perplexity

    found = {}
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("evaluating", total=2 * len(windows_BL))
        for name, folder in (("dense_perplexity", source), ("perplexity", out)):
            model = load_folder(folder)
            result = perplexity(model, windows_BL, lambda done, total: bar.advance(task), batch_size=1)
            found[name] = result["perplexity"]
    say(f"perplexity {found['perplexity']:.3f}, of the dense model {found['dense_perplexity']:.3f}")
    return found
