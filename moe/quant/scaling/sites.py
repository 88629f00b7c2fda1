"""Places of a decoder layer where channels can be scaled without changing what it computes.

At a site one thing makes a vector and some matrices read it. What makes it is divided by a positive scale per channel, the columns
of the matrices are multiplied by it: the products stay, and what is rounded changes. In the order of the layer:

- input norm -> q, k, v
- v -> o; with grouped queries one scale per channel of a KV head, shared by the query heads that read it
- norm before the FFN -> router, shared experts and their gate, every expert; or the dense FFN
- up rows -> down columns, in each expert and in a shared or dense FFN; a SwiGLU is linear in up

Legend: T tokens, D model, P output rows, Q columns of a matrix, S scales of a site, F FFN, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.quant.inputs import Rows


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A matrix that reads a site's channels.

    Attributes:
        name: for people.
        weight_PQ: a view of the layer's parameter.
        rows: its input as it is now.
        is_quantized: whether its weight is going to be rounded to the scheme's grid; routers and gates of shared experts are not.
        is_rounded_router: whether it is a router's, and that is going to be rounded (`moe.quant.router`).
    """

    name: str
    weight_PQ: Tensor
    rows: Callable[[], Rows]
    is_quantized: bool = True
    is_rounded_router: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place.

    Attributes:
        name: for people.
        kind: "attention", "value", "dense", "moe" or "up".
        readers: all matrices that read the channels.
        divide: divides what makes them, and the captured rows, by (S,) scales.
        scale_of_Q: (Q,) int64, which scale multiplies each column; ``None``: its own.
        storable: (S,) scales nearest to those given that the checkpoint's dtype holds exactly; ``None``: any are.
    """

    name: str
    kind: str
    readers: list[Reader]
    divide: Callable[[Tensor], None]
    scale_of_Q: Tensor | None = None
    storable: Callable[[Tensor, torch.dtype], Tensor] | None = None

    def columns(self, scale_S: Tensor) -> Tensor:
        """(Q,) factor of each column."""
        return scale_S if self.scale_of_Q is None else scale_S[self.scale_of_Q]

    def largest(self, values_Q: Tensor) -> Tensor:
        """(S,) largest value among the columns that share a scale."""
        return values_Q if self.scale_of_Q is None else self._reduced(values_Q, "amax")

    def mean(self, values_Q: Tensor) -> Tensor:
        """(S,) mean over the columns that share a scale."""
        return values_Q if self.scale_of_Q is None else self._reduced(values_Q, "mean")

    def _reduced(self, values_Q: Tensor, how: str) -> Tensor:
        assert self.scale_of_Q is not None
        empty_S = values_Q.new_zeros(int(self.scale_of_Q.max()) + 1)
        return empty_S.scatter_reduce(0, self.scale_of_Q, values_Q, how, include_self=False)

    @torch.no_grad()
    def fold(self, scale_S: Tensor, stored: torch.dtype) -> None:
        """Scale the layer and its captured rows."""
        assert bool((scale_S > 0).all()) and bool(scale_S.isfinite().all()), f"scales of {self.name} must be positive"
        if self.storable is not None:
            scale_S = self.storable(scale_S, stored)
        self.divide(scale_S)
        for reader in self.readers:
            reader.weight_PQ.mul_(self.columns(scale_S))
