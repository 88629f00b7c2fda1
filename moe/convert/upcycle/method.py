"""What an upcycling method says: how one layer's experts and gate come from dense FFNs.

Legend: D model, F FFN width of the expert, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.options import UpcycleOptions


class Upcycler(ABC):
    """A method; stateless.

    Attributes:
        name: as on the command line.
        summary: what it does, for the model card; with its paper.
        uses: the options of its own, of `SPECIFIC`.
        several_sources: whether it takes more than one dense model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset()
    several_sources: ClassVar[bool] = False

    def check(self, options: UpcycleOptions, width: int, num_sources: int) -> None:
        """Check options against each other, the dense FFN's ``width`` and the number of sources.

        Raises:
            ValueError: they do not fit; names the option and what is possible.
        """
        options.check_used(self.uses)
        if num_sources > 1 and not self.several_sources:
            raise ValueError(f"--also with --method {self.name}: it takes one source; use --method btx for several")

    @abstractmethod
    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Whether any weights that sum to 1 give the dense model's output; ``dtype`` is that of the experts."""

    @abstractmethod
    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """The E routed experts in order, one at a time; ``sources`` must stay as they are."""

    def shared(self, sources: Sequence[DenseFFN], options: UpcycleOptions) -> DenseFFN | None:
        """The shared experts as one FFN, or ``None``."""
        return None

    def gate(self, dim: int, options: UpcycleOptions, random: torch.Generator) -> Tensor:
        """(E, D) fp32 weights of the linear gate: normal of deviation ``router_std``."""
        return torch.randn(options.num_experts, dim, generator=random) * options.router_std
