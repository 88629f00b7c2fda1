"""Decides in what a model is going to be stored, and refuses what cannot be, before any weight is read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.modeling import MoEForCausalLM
from moe.models.stock import FORMATS
from moe.models.stock.reformat import reformat, source_format
from moe.models.stock.write import check_fits
from moe.models.walk import EMBEDDINGS
from moe.quant.containers import CONTAINERS, Container, Target
from moe.quant.layer import matrices
from moe.quant.options import QuantOptions
from moe.quant.scaling.find import router_problem
from moe.quant.schemes import Scheme
from moe.routers import parse_router


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to be made.

    Attributes:
        source: the model.
        own: its format.
        options: methods.
        container: how layers are stored.
        target: what is stored.
        rewritten: weights that change so that the model fits the target's format, one sentence each.
    """

    source: ModelFolder
    own: str
    options: QuantOptions
    container: Container
    target: Target
    rewritten: list[str]


def make_plan(source: ModelFolder, options: QuantOptions, to: str | None = None, container: str | None = None) -> Plan:
    """Choose container and format, and check that all goes together.

    Args:
        source: a folder in any format of `FORMATS`.
        options: scheme and methods.
        to: a format; by default the source's own, or the first that fits where servers do not know that one.
        container: a key of `CONTAINERS`; by default the scheme's first.

    Raises:
        ValueError: something does not; names it, and what does.
    """
    own, scheme = source_format(source), options.resolved()
    name = scheme.containers[0] if container is None else container
    if name not in CONTAINERS:
        raise ValueError(f"--container {name!r} is unknown; use one of {', '.join(CONTAINERS)}")
    chosen = CONTAINERS[name]
    config = reformat(source).config
    if to is None:
        to = own if own in chosen.targets else _first_fit(config, chosen)
    check_fits(config, to)
    rewritten = [] if to == own else FORMATS[to].notes(config)
    if to != own:
        config = FORMATS[to].from_stock(FORMATS[to].to_stock(config))
    target = Target(config=config, scheme=scheme, to=to, dtype=source.dtype(EMBEDDINGS))
    chosen.check(target)
    _check_router(config, options)
    _check_groups(config, scheme)
    return Plan(source=source, own=own, options=options, container=chosen, target=target, rewritten=rewritten)


def _first_fit(config: MoEConfig, container: Container) -> str:
    problems = {name: FORMATS[name].refusals(config) for name in container.targets}
    for name, found in problems.items():
        if not found:
            return name
    reasons = "; ".join(f"{name}: {found[0]}" for name, found in problems.items())
    raise ValueError(
        f"the model fits no architecture of --container {container.name}: {reasons}; or use --container simulated"
    )


def _check_router(config: MoEConfig, options: QuantOptions) -> None:
    """Raise a ValueError where inputs of the router are scaled and it is not made for that."""
    name = config.spec.router["name"]
    router_class, router_config = parse_router(config.spec.router)
    if options.scaling is None:
        return
    text_config: Any = config.text_config
    router = router_class(text_config.hidden_size, config.spec.num_experts, router_config).eval()
    random = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, text_config.hidden_size, generator=random)
    if problem := router_problem(router, x_TD):
        raise ValueError(
            f"--method {options.scaling} scales the inputs of the router, and moe.router.name={name!r} does not allow it: "
            f"{problem}; use --method rtn or gptq"
        )


def _check_groups(config: MoEConfig, scheme: Scheme) -> None:
    """Raise a ValueError where groups do not divide every matrix; names a size that does."""
    group_size = scheme.weights.group_size
    if group_size is None:
        return
    with torch.device("meta"):
        layers: list[nn.Module] = list(MoEForCausalLM(config).model.layers)
    columns = {matrix.label: matrix.weight_PQ.shape[-1] for layer in layers for matrix in matrices(layer)}
    for label, num_columns in columns.items():
        if num_columns % group_size:
            fitting = [
                size
                for size in scheme.group_sizes
                if size == 0 or not any(num_columns % size for num_columns in columns.values())
            ]
            fix = f"use --group-size {max(fitting)}" if fitting else "use another scheme"
            raise ValueError(
                f"--scheme {scheme.name} in groups of {group_size}: they do not divide the {num_columns} columns of {label}; {fix}"
            )
