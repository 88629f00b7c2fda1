"""`moe tomoe`."""

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import DeviceOption, JsonOption, choose_device, say


def tomoe(
    source: Annotated[Path, typer.Argument(help="Folder of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    calibration: Annotated[list[Path], typer.Option(help="Text file to train on; may be repeated.")],
    experts: Annotated[int, typer.Option(min=2, help="Experts, of which one runs per token.")] = 8,
    active: Annotated[float, typer.Option(help="Share of an FFN's neurons that an expert has.")] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps; the paper takes 20,000.")] = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in all, passed as often as it takes.")] = 262144,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 1,
    shared: Annotated[
        bool, typer.Option("--shared", help="Store what all experts of a layer have in common once, as shared experts.")
    ] = False,
    width_multiple: Annotated[
        int, typer.Option(min=1, help="Round the experts' width up to a multiple; quantised formats want 32 or more.")
    ] = 32,
    to: Annotated[str, typer.Option(help="Format: moe, glm4_moe, or without --shared mixtral, qwen3_moe.")] = "moe",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute the model in bf16.")] = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train masks that cut the FFNs of a dense model into overlapping experts (ToMoE, arXiv 2501.15316).

    The model's weights stay as they are: masks and routers are trained for the masked model to say what the dense one says.
    The result runs one expert per token. Attention stays dense.

    Example: `moe tomoe SmolLM2-135M smol-tomoe --calibration wiki.txt --active 0.5 --steps 2000 --to mixtral`
    """
    from transformers.utils import logging as hf_logging

    from moe.convert.tomoe import ToMoEOptions, report_lines, tomoe_convert
    from moe.models.calibration_text import read_windows
    from moe.models.folder import ModelFolder
    from moe.train.progress import TrainProgress

    hf_logging.disable_progress_bar()
    options = ToMoEOptions(
        num_experts=experts,
        active_share=active,
        steps=steps,
        batch_size=batch,
        lr=lr,
        width_multiple=width_multiple,
        bf16=bf16,
        seed=seed,
    )
    chosen = choose_device(device)
    dense = ModelFolder(source)
    windows = read_windows(source, calibration, tokens, window, seed=seed).calibration_BL
    with TrainProgress(steps) as progress:
        started = time.monotonic()

        def show(step: int, total: int, parts: dict[str, float]) -> None:
            progress.update(step, parts["loss"], step * batch * window / (time.monotonic() - started))
            if step % max(total // 10, 1) == 0:
                progress.message(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in parts.items()))

        result = tomoe_convert(
            dense,
            out,
            windows,
            options,
            to=to,
            device=chosen,
            shared=shared,
            progress=show,
            command=shlex.join(["moe", *sys.argv[1:]]),
        )
    for line in report_lines(result):
        say(line)
    say(f"wrote {out}")
    if as_json:
        print(json.dumps({"model": str(out), **asdict(result)}))
