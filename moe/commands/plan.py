"""`moe plan`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moe.commands.amounts import parse_amount
from moe.commands.common import JsonOption, say


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML recipe, such as configs/pretrain.yaml.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    hardware: Annotated[str, typer.Option(help="a100, h100, h200, b200 or cpu.")] = "h100",
    memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80G.")] = None,
    interconnect: Annotated[
        str | None, typer.Option(help="Bytes per second and GPU within and between nodes, such as 450G/50G.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share the fast link.")] = 8,
    ep: Annotated[str | None, typer.Option(help="Expert-parallel degrees to try, such as 8,16.")] = None,
    zero: Annotated[str | None, typer.Option(help="ZeRO stages to try, such as 1,2.")] = None,
    micro_batch: Annotated[str | None, typer.Option(help="Micro-batch sizes to try, such as 1,2.")] = None,
    assume: Annotated[list[str] | None, typer.Option(help="Another assumption, as matmul_efficiency=0.5.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 8,
    trace: Annotated[
        list[str] | None, typer.Option(help="Replay a routing: a file of `moe trace`, uniform or zipf:1.0.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the replayed routings.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of CONFIG: training FLOPs, such as 1e20; chooses the model.")
    ] = None,
    law: Annotated[
        str, typer.Option(help="With --budget: joint, fine-grained, fine-grained-16, fine-grained-dense or a file.")
    ] = "joint",
    max_experts: Annotated[int | None, typer.Option(min=1, help="With --budget: experts of a layer.")] = None,
    active_params: Annotated[str | None, typer.Option(help="With --budget: exactly these, such as 1.3B.")] = None,
    max_params: Annotated[str | None, typer.Option(help="With --budget: at most these in total.")] = None,
    write: Annotated[Path | None, typer.Option(help="With --budget: recipe to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, traffic and speed of a job on GPUs that are not here, and choose its layout; or choose a model for a budget.

    The settings of the fastest layout that fits go to stdout, to be put behind `moe train CONFIG`. With `--budget`, a scaling law
    says which model to train on how many tokens, and `--write` makes a recipe of it.

    Example: `moe plan configs/pretrain.yaml model.decoder.vocab_size=49152 --gpus 64 --hardware h100 --trace zipf:1.0`

    Example: `moe plan --budget 1e20 --max-experts 16 --write optimal.yaml`
    """
    from rich.console import Console

    if (config is None) == (budget is None):
        raise ValueError("give either CONFIG, to plan how to train it, or --budget FLOPS, to choose what to train")
    if budget is not None:
        _plan_budget(budget, law, max_experts, active_params, max_params, write, as_json)
        return
    for name, value in {
        "active-params": active_params,
        "max-params": max_params,
        "write": write,
        "max-experts": max_experts,
    }.items():
        if value is not None:
            raise ValueError(f"--{name} {value} goes with --budget, and CONFIG was given; leave it out")
    assert config is not None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so on stdout
    from moe.scaling.planner import overrides as settings
    from moe.train import plan as planning
    from moe.train.config import load_config

    console = Console(stderr=True)
    options = planning.PlanOptions(
        gpus=gpus,
        hardware=hardware,
        memory=memory,
        interconnect=interconnect,
        gpus_per_node=gpus_per_node,
        ep=ep,
        zero=zero,
        micro_batch=micro_batch,
        assume=tuple(assume or ()),
    )
    if picture is not None and not trace:
        raise ValueError("--picture shows replayed routings; add --trace uniform, --trace zipf:1.0 or --trace FILE")
    planner = planning.make_planner(load_config(config, overrides), options, console)
    candidates = planner.search(planning.search_space(options))
    replays = planning.replays(planner, trace or [], candidates[0].layout) if trace else []
    if as_json:
        print(json.dumps(planning.as_json(planner, candidates, replays)))
    else:
        planning.render(planner, candidates, top, console)
        if replays:
            planning.render_replays(replays, console)
    if picture is not None:
        from moe.train.plan_pictures import draw_replays

        draw_replays(replays, f"{config.stem}, {planner.hardware.name.upper()}, {gpus_per_node} GPUs per node", picture)
    best = planning.chosen(candidates, planner.hardware)
    if not as_json:
        print(" ".join(settings(best.layout)))


def _plan_budget(
    budget: str,
    law: str,
    max_experts: int | None,
    active_params: str | None,
    max_params: str | None,
    write: Path | None,
    as_json: bool,
) -> None:
    from rich.console import Console

    from moe.scaling.laws import find_law
    from moe.scaling.laws.optimum import Limits
    from moe.train import budget as budgets

    limits = Limits(
        max_experts=max_experts,
        active=None if active_params is None else parse_amount("--active-params", active_params),
        max_total=None if max_params is None else parse_amount("--max-params", max_params),
    )
    plan = budgets.plan_budget(find_law(law), parse_amount("--budget", budget), limits)
    if write is not None:
        budgets.write_config(plan, write)
    if as_json:
        print(json.dumps(budgets.as_json(plan)))
        return
    budgets.render(plan, Console(stderr=True))
    if write is not None:
        say(f"wrote {write}; next: moe plan {write} --gpus 8, then moe train {write}")
