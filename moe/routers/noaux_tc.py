"""DeepSeek-V3's gate (arXiv 2412.19437 eq. 12-16): sigmoid scores, group-limited top-k, balance by a selection bias."""

from dataclasses import dataclass
from typing import Literal

from moe.routers.topk import TopKConfig, TopKRouter


@dataclass(frozen=True, kw_only=True)
class NoAuxConfig(TopKConfig):
    """`TopKConfig` with DeepSeek-V3's choices; its 671B model has 8 groups of which 4 are kept and route_scale 2.5."""

    score: Literal["softmax", "sigmoid"] = "sigmoid"
    selection_bias: bool = True


class NoAuxRouter(TopKRouter):
    """Top-k with `NoAuxConfig`; set ``balance.bias_update_rate`` so that the bias moves."""

    Config = NoAuxConfig
