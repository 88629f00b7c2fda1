"""What every router is: an `nn.Module` from tokens to a routing, with a frozen config dataclass of its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from moe.types import Routing, SoftRouting


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of a router; subclasses add theirs and check them in ``__post_init__``."""


class Router(nn.Module, ABC):
    """Maps tokens to experts.

    Args:
        dim: D.
        num_experts: E.
        config: an instance of the class's ``Config``.
    """

    Config: type[RouterConfig]

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.dim, self.num_experts, self.config = dim, num_experts, config

    @abstractmethod
    def forward(self, x_TD: Tensor, keep_T: Tensor | None = None) -> Routing | SoftRouting:
        """Route tokens.

        Args:
            x_TD: (T, D), any floating dtype; decisions are taken in fp32.
            keep_T: (T,) bool, False at padding, which is routed but counts in no loss of the router's own.
        """

    @abstractmethod
    def reset_parameters(self, std: float) -> None:
        """Initialise from the global RNG; ``std`` is the model's initializer range."""

    @property
    @abstractmethod
    def max_experts_per_token(self) -> int:
        """Most assignments that one token gets; what FLOP counts and capacities use."""
