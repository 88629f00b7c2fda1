"""`moe upcycle`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.common import JsonOption, say


def upcycle(
    source: Annotated[Path, typer.Argument(help="Folder of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    experts: Annotated[int, typer.Option(help="Routed experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    method: Annotated[str, typer.Option(help="copy, drop, noise, virtual-group or btx.")] = "copy",
    ratio: Annotated[float, typer.Option(help="drop, noise: share of an expert's neurons that change.")] = 0.5,
    indices: Annotated[
        str,
        typer.Option(help="drop, noise: 'shared' by an expert's matrices, or 'independent' as in the released code."),
    ] = "shared",
    noise_std: Annotated[float, typer.Option(help="noise: its deviation.")] = 0.02,
    granularity: Annotated[int, typer.Option(help="virtual-group: shards that the FFN is cut into.")] = 1,
    shared: Annotated[int, typer.Option(help="virtual-group: shards that every token passes.")] = 0,
    also: Annotated[list[Path] | None, typer.Option(help="btx: another model; may be repeated.")] = None,
    layers: Annotated[str, typer.Option(help="all, or layers from 0 as 3,8-11,20- or 0-:2.")] = "all",
    to: Annotated[str, typer.Option(help="Format: moe, or a stock architecture such as mixtral.")] = "moe",
    score: Annotated[str, typer.Option(help="Of the gates: softmax, or sigmoid as glm4_moe needs.")] = "softmax",
    renormalize: Annotated[
        bool, typer.Option(help="A token's weights sum to 1, or are its scores, whose sum is near 1 at first.")
    ] = True,
    router_std: Annotated[float, typer.Option(help="Deviation of the new gates' weights.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Annotated[str, typer.Option(help="keep, fp32 or bf16.")] = "keep",
    verify: Annotated[
        bool, typer.Option(help="Compare logits with the source's; needs memory for a whole model in fp32.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Make a Mixture-of-Experts of a dense model, by copying its FFNs into experts.

    copy and virtual-group keep the model's function; drop, noise and btx change it. Weights are read and written layer by layer.

    Example: `moe upcycle SmolLM2-135M smol-moe --experts 8 --top-k 2 --method drop --ratio 0.5`
    """
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    from moe.convert.upcycle.options import UpcycleOptions
    from moe.convert.upcycle.run import upcycle as run

    hf_logging.disable_progress_bar()
    options = UpcycleOptions(
        num_experts=experts,
        top_k=top_k,
        method=method,
        ratio=ratio,
        indices=indices,  # type: ignore[arg-type]  # checked there
        noise_std=noise_std,
        granularity=granularity,
        num_shared=shared,
        layers=layers,
        score=score,  # type: ignore[arg-type]
        renormalize=renormalize,
        router_std=router_std,
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
    )
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("writing layers", total=None)
        done = run(
            [source, *(also or [])],
            out,
            options,
            to=to,
            verify=verify,
            progress=lambda layer, total: bar.update(task, completed=layer, total=total),
        )
    if as_json:
        comparison = None if done.comparison is None else asdict(done.comparison)
        print(json.dumps({"model": str(out), "exact": done.is_exact, "comparison": comparison}))
        return
    say(f"wrote {out}: {experts} experts, {top_k} per token, method {method}")
    if done.comparison is not None:
        found = done.comparison
        say(
            f"logits differ from {source} by at most {found.max_diff:.2e} (their root mean square is {found.reference_rms:.2f}); "
            f"{found.same_top1:.1%} of {found.tokens} tokens have the same most likely next token"
        )
        if not done.is_exact:
            say("the method changes the model's function: train it further")
