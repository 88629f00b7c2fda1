"""Routers by the name that configs use. Adding one: a file here, a line in `ROUTERS`, a test file (see CONTRIBUTING)."""

import dataclasses
from typing import Any

from moe.errors import nearest
from moe.routers.base import Router, RouterConfig, StepLoad
from moe.routers.noaux_tc import NoAuxRouter
from moe.routers.noisy_topk import NoisyTopKRouter
from moe.routers.switch import SwitchRouter
from moe.routers.topk import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "switch": SwitchRouter,
    "noisy_topk": NoisyTopKRouter,
    "noaux_tc": NoAuxRouter,
}


def parse_router(options: dict[str, Any]) -> tuple[type[Router], RouterConfig]:
    """Router class and checked config from ``{"name": ..., option: value, ...}``."""
    options = dict(options)
    name = options.pop("name", "topk")
    if name not in ROUTERS:
        raise ValueError(f"router.name={name!r} is unknown; {nearest(str(name), ROUTERS)}")
    config_class = ROUTERS[name].Config
    known = {field.name for field in dataclasses.fields(config_class)}
    for key in options:
        if key not in known:
            raise ValueError(f"router.{key} is not an option of router {name!r}; {nearest(key, known)}")
    return ROUTERS[name], config_class(**options)


__all__ = ["ROUTERS", "Router", "RouterConfig", "StepLoad", "parse_router"]
