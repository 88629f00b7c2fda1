"""Switch routing (arXiv 2101.03961 eq. 1-2): the best expert only, weighted by its full softmax probability."""

from dataclasses import dataclass

from torch import nn

from moe.routers.base import WidthRole
from moe.routers.topk import TopKConfig, TopKRouter


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(TopKConfig):
    """`TopKConfig` with Switch's values; the weight must stay the full probability, or the router gets no gradient.

    Attributes:
        init_scale: factor s of the router's truncated normal initialisation, std = sqrt(s / D) (table 3: 0.1).
    """

    top_k: int = 1
    renormalize: bool = False
    jitter: float = 1e-2
    init_scale: float = 0.1


class SwitchRouter(TopKRouter):
    """Top-1 with full probability, input jitter, and the paper's small initialisation."""

    Config = SwitchConfig
    config: SwitchConfig

    def reset_parameters(self, std: float) -> None:
        """Truncated normal of std sqrt(init_scale / D), whatever the model's own range."""
        std = (self.config.init_scale / self.dim) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def width_roles(self) -> dict[str, WidthRole]:
        """The paper's initialisation shrinks with D."""
        return super().width_roles() | {"weight": WidthRole(role="output", init_exponent=0.5)}
