"""`moe laws`: scaling laws of finished runs, and what published ones predict."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.amounts import parse_amount
from moe.commands.common import JsonOption, say


def fit(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or CSV files of runs.")],
    form: Annotated[str, typer.Option(help="chinchilla, fine-grained or joint.")] = "chinchilla",
    hold: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: keep a constant, such as c=1.36.")] = None,
    samples: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the law, to be given as --law.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of measured against predicted losses.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a scaling law to runs of one's own, and say how far it can be trusted.

    Runs must be of the same data and tokenizer. A CSV file has the columns name, active, total_blocks, tokens, expansion,
    granularity and loss (see docs/scaling-laws.md).

    Example: `moe laws fit runs/size-* --form chinchilla --out law.json --picture law.png`
    """
    from moe.scaling.laws.own import as_dict, fit_runs
    from moe.train.law_runs import read_runs

    own = fit_runs(read_runs(runs), form, _held(hold or []), samples=samples, seed=seed)
    result = as_dict(own)
    if out is not None:
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if picture is not None:
        from moe.train.law_pictures import draw_fit

        draw_fit(own, picture)
    if as_json:
        print(json.dumps(result))
    else:
        _render_fit(result)


def _held(settings: list[str]) -> dict[str, float]:
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--hold {setting!r} must read NAME=VALUE, such as c=1.36") from None
    return found


def _render_fit(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe.scaling.laws.assess import CONFIDENCE

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    table = Table(title=f"{result['formula']}, {len(result['runs'])} runs", title_justify="left")
    for column in ("constant", "value", f"{CONFIDENCE:.0%} interval"):
        table.add_column(column, justify="left" if column == "constant" else "right")
    for name, value in result["constants"].items():
        interval = result["intervals"].get(name)
        span = "held" if interval is None else f"{interval['low']:.4g} to {interval['high']:.4g}"
        table.add_row(name, f"{value:.4g}", span)
    console.print(table)
    beyond = result["extrapolation_rmse"]
    console.print(
        f"typical error of the loss: {result['rmse']:.2%} on these runs, {result['left_out_rmse']:.2%} on a run left out"
        + ("" if beyond is None else f", {beyond:.2%} on the fifth with the lowest loss from the rest")
    )
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def predict(
    active: Annotated[str, typer.Option(help="Active parameters with embedding and head, such as 1.3B.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 30B.")],
    law: Annotated[
        str | None,
        typer.Option(help="joint, fine-grained, fine-grained-16, fine-grained-dense or a file; all by default."),
    ] = None,
    experts: Annotated[
        float, typer.Option(min=1, help="E, expert parameters over those that a token uses: E x G experts.")
    ] = 1.0,
    granularity: Annotated[float, typer.Option(min=1, help="G, experts that a token uses.")] = 1.0,
    non_embedding: Annotated[bool, typer.Option(help="--active counts no embedding and head.")] = False,
    vocab_size: Annotated[int, typer.Option(min=1, help="Of embedding and head.")] = 50257,
    as_json: JsonOption = False,
) -> None:
    """Predict the loss of a model by published laws or one's own.

    Losses of two laws are of different data and must not be compared with each other, only their differences between models.

    Example: `moe laws predict --active 1.3B --tokens 30B --experts 8`
    """
    from moe.scaling.laws import LAWS, find_law

    count, length = parse_amount("--active", active), parse_amount("--tokens", tokens)
    found = []
    for chosen in [find_law(law)] if law is not None else LAWS.values():
        row: dict[str, Any] = {"law": chosen.name, "source": chosen.source}
        try:
            size = chosen.size(count, experts, granularity, vocab_size, with_embedding=not non_embedding)
        except ValueError as problem:
            if law is not None:
                raise
            row["loss"], row["reason"] = None, str(problem)
        else:
            row["loss"] = chosen.loss(size, length)
            row["flops"] = chosen.training_flops(size, length)
            row["sizes"] = {name: getattr(size, name) for name in ("active", "active_blocks", "total", "total_blocks")}
            row["extrapolations"] = chosen.extrapolations(size, length)
        found.append(row)
    if as_json:
        print(json.dumps(found))
        return
    for row in found:
        if row["loss"] is None:
            say(f"{row['law']}: {row['reason']}")
            continue
        sizes = row["sizes"]
        say(
            f"{row['law']}: loss {row['loss']:.3f} nats per token ({sizes['active']:.3g} active and {sizes['total']:.3g} total "
            f"parameters, {sizes['active_blocks']:.3g} and {sizes['total_blocks']:.3g} without embeddings; "
            f"{row['flops']:.3g} FLOPs)"
        )
        for sentence in row["extrapolations"]:
            say(f"  extrapolated: {sentence}")
