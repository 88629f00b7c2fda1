"""`moe recover`."""

import json
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import DeviceOption, JsonOption, choose_device, say


def recover(
    source: Annotated[Path, typer.Argument(help="Folder of a carved or upcycled model, in our format.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    text: Annotated[Path, typer.Option(help="Text file; its last fifth is held out.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    mode: Annotated[str, typer.Option(help="lora: low-rank updates, merged at the end; or full.")] = "lora",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default 2e-4 with lora, 2e-5 in full.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 4,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Windows per forward; default: all of a step.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    distill: Annotated[Path | None, typer.Option(help="Folder of the dense model, to stay close to.")] = None,
    distill_weight: Annotated[float, typer.Option(help="Factor on that distance; the loss on the text has 1.")] = 1.0,
    router_lr: Annotated[
        float,
        typer.Option(help="How far a step may move a router's scores, as a share of their spread; 0 freezes routers."),
    ] = 0.0,
    balance_rate: Annotated[
        float, typer.Option(help="Step of the selection bias, as a share of the spread of scores; 0 leaves it.")
    ] = 0.0,
    rank: Annotated[int, typer.Option(min=1, help="lora: rank.")] = 8,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at both ends only.")] = 50,
    eval_windows: Annotated[int, typer.Option(min=1, help="Held-out windows, at most.")] = 16,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16; weights stay fp32.")] = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the text and of LoRA.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a converted model briefly, to win back what the conversion lost; on one device.

    Over several processes: `moe train CONFIG model.init_from=FOLDER`.

    Example: `moe recover smol-moe smol-moe-recovered --text wiki.txt --steps 200 --distill SmolLM2-135M`
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    from moe.convert.recover import Point, RecoverOptions, recover_folder
    from moe.models.calibration_text import read_text, split_text, tokenize
    from moe.models.evaluate import cut_windows
    from moe.models.folder import ModelFolder
    from moe.train.progress import TrainProgress

    hf_logging.disable_progress_bar()
    options = RecoverOptions(
        steps=steps,
        mode=mode,  # type: ignore[arg-type]  # checked there
        lr=lr,
        batch_size=batch,
        micro_batch_size=micro_batch,
        distill=distill_weight,
        router_lr=router_lr,
        balance_rate=balance_rate,
        lora_rank=rank,
        eval_every=eval_every,
        bf16=bf16,
        seed=seed,
    )
    chosen = choose_device(device)
    ModelFolder(source)  # says what is wrong with the folder before its tokenizer does
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, held_out = (tokenize(tokenizer, part) for part in split_text(read_text(text)))
    windows = cut_windows(train, window, None), cut_windows(held_out, window, eval_windows)
    with TrainProgress(steps) as progress:
        started = time.monotonic()

        def report(point: Point) -> None:
            if point.step:
                progress.update(point.step, point.loss, point.tokens / (time.monotonic() - started))
            if point.held_out is not None:
                progress.message(
                    f"step {point.step}: held-out loss {point.held_out:.4f}, perplexity {math.exp(min(point.held_out, 700)):.3f}"
                )

        result = recover_folder(
            source,
            out,
            *windows,
            options,
            distill=distill,
            device=chosen,
            report=report,
            command=shlex.join(["moe", *sys.argv[1:]]),
        )
    say(f"wrote {out}: perplexity on held-out text {result.before:.3f} -> {result.after:.3f}")
    if as_json:
        print(json.dumps({"model": str(out), "text": str(text), "window": window, **asdict(result)}))
