"""`moe trace`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say


def trace(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("trace.safetensors"),
    batches: Annotated[int, typer.Option(min=1, help="Micro-batches of held-out text.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Save which experts a run's model chooses on its held-out text, for `moe plan --trace`.

    Example: `moe trace runs/tiny --out tiny.safetensors`
    """
    import moe.models  # noqa: F401  (registers our architecture)
    from moe.train.trace_run import trace_run

    found = trace_run(run, batches)
    found.save(out)
    steps, layers, tokens, top_k = found.expert_ids_SYTK.shape
    if as_json:
        print(json.dumps({"trace": str(out), "batches": steps, "layers": layers, "tokens": tokens, "top_k": top_k}))
    else:
        say(f"wrote {out}: {steps} batches of {tokens} tokens through {layers} MoE layers")
