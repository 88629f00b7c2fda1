"""Routers by the name that configs use. Adding one: a file here, a line in `ROUTERS`, a test file (see CONTRIBUTING)."""

import dataclasses
from typing import Any

from moe.errors import nearest
from moe.routers.base import Router, RouterConfig, StepLoad
from moe.routers.cmoe import CMoERouter
from moe.routers.dense_to_sparse import DenseToSparseRouter
from moe.routers.dselect_k import DSelectKRouter
from moe.routers.expert_choice import ExpertChoiceRouter
from moe.routers.gshard import GShardRouter
from moe.routers.gumbel import GumbelRouter
from moe.routers.hash import HashRouter
from moe.routers.kmeans import KMeansRouter
from moe.routers.mixture_of_tokens import MixtureOfTokensRouter
from moe.routers.modified_softmax import ModifiedSoftmaxRouter
from moe.routers.noaux_tc import NoAuxRouter
from moe.routers.noisy_topk import NoisyTopKRouter
from moe.routers.relu import ReLURouter
from moe.routers.round_robin import RoundRobinRouter
from moe.routers.sinkhorn import SinkhornRouter
from moe.routers.soft import SoftRouter
from moe.routers.sparsemixer import SparseMixerRouter
from moe.routers.sparsemixer_v2 import SparseMixerV2Router
from moe.routers.stochastic import StochasticRouter
from moe.routers.switch import SwitchRouter
from moe.routers.topk import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "switch": SwitchRouter,
    "noisy_topk": NoisyTopKRouter,
    "noaux_tc": NoAuxRouter,
    "hash": HashRouter,
    "kmeans": KMeansRouter,
    "round_robin": RoundRobinRouter,
    "gshard": GShardRouter,
    "sparsemixer": SparseMixerRouter,
    "sparsemixer_v2": SparseMixerV2Router,
    "stochastic": StochasticRouter,
    "dselect_k": DSelectKRouter,
    "gumbel": GumbelRouter,
    "dense_to_sparse": DenseToSparseRouter,
    "modified_softmax": ModifiedSoftmaxRouter,
    "relu": ReLURouter,
    "soft": SoftRouter,
    "mixture_of_tokens": MixtureOfTokensRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "cmoe": CMoERouter,
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
