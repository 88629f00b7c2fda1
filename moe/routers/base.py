"""What every router is: an `nn.Module` from tokens to a routing, with a frozen config dataclass of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from moe.types import NO_INFO, Routing, SoftRouting, TokenInfo


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of a router; subclasses add theirs and check them in ``__post_init__``."""


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What a router is told after an optimizer step.

    Attributes:
        counts_E: (E,) int64 assignments per expert since the last step, over all data-parallel ranks; of this rank alone
            where the router does not set ``uses_load``.
        model_density: () share of all token-expert pairs that were assigned, the mean over the MoE layers that finish the
            step together; only where the router sets ``uses_load``.
        reduce: sums a tensor over the data-parallel ranks (the identity on one rank); collective.
    """

    counts_E: Tensor
    model_density: Tensor | None
    reduce: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class WidthRole:
    """How a router's tensor takes part in growing width; `moe.scaling.mup` makes factors of it.

    Attributes:
        role: "output" (D -> finite), "hidden" (the same where a size of its own matters, as of a neuron), "unit_input" (D -> finite
            for tokens of unit length), "normalized" (used divided by its norm over D), or "vector".
        init_exponent: e where its initial deviation goes as D ** -e.
    """

    role: Literal["output", "hidden", "unit_input", "normalized", "vector"]
    init_exponent: float = 0.0


class Router(nn.Module, ABC):
    """Maps tokens to experts.

    Args:
        dim: D.
        num_experts: E.
        config: an instance of the class's ``Config``.

    Class attributes:
        fp32_buffers: floating-point buffers that stay fp32 when the model is converted: small steps vanish in bf16.
        takes_balance_loss: whether ``balance.aux_coef`` applies; False for routers that balance by other means, or for
            which the Switch loss has no meaning.
        uses_load: whether `after_step` reads loads summed over ranks and layers (costs a collective per step).
    """

    Config: type[RouterConfig]
    fp32_buffers: ClassVar[tuple[str, ...]] = ()
    takes_balance_loss: ClassVar[bool] = True
    uses_load: ClassVar[bool] = False

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.dim, self.num_experts, self.config = dim, num_experts, config

    @abstractmethod
    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing | SoftRouting:
        """Route tokens.

        Args:
            x_TD: (T, D), any floating dtype; decisions are taken in fp32.
            info: sequences, padding and vocabulary ids.
        """

    @abstractmethod
    def reset_parameters(self, std: float) -> None:
        """Initialise from the global RNG; ``std`` is the model's initializer range."""

    @property
    @abstractmethod
    def mean_experts_per_token(self) -> float:
        """Expert evaluations per token, on average over many tokens; what FLOP and parameter counts use."""

    def width_roles(self) -> dict[str, WidthRole]:
        """Role of each parameter under muP: matrices map D to a number that does not grow with it, and the rest are vectors."""
        return {
            name: WidthRole(role="output" if parameter.dim() >= 2 else "vector")
            for name, parameter in self.named_parameters()
        }

    def after_step(self, load: StepLoad) -> None:
        """Called once per applied optimizer step, without gradients; schedules and controllers move here."""

    def causal_problem(self) -> str | None:
        """Why this router must not be used in a causal model, and the fix; ``None`` where it may.

        A token's result must not depend on later tokens of its own sequence.
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module, but keep ``fp32_buffers`` in fp32."""
        kept = {name: self._buffers[name] for name in self.fp32_buffers if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self._buffers[name]
            if before is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = before.to(moved.device)
        return self


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise a ValueError if there are fewer than K experts."""
    if top_k > num_experts:
        raise ValueError(f"router.top_k={top_k} is more than num_experts={num_experts}; lower it or add experts")
