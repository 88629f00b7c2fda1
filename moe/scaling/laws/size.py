"""Sizes of a model as the papers on scaling laws count them.

Papers mean different things by N. All of them are formulas of the width d, the number of blocks n, the expansion rate E, the
granularity G and the vocabulary V; norms and biases are left out everywhere, routers too:

    attention of a block      4 d^2
    FFN of a dense block      f d^2            f = 8: two matrices of width 4d (GELU), f = 9: three of width 3d (SwiGLU)
    experts of a block        E f d^2          G of the E G experts see each token, which are f d^2 parameters again
    embedding and head        2 d V

"Blocks" below are all of it but embedding and head. E is the *expansion rate* of arXiv 2402.07871: expert parameters over those
that a token uses. It is the number of experts where G = 1.
"""

from dataclasses import dataclass

WIDTH_PER_BLOCK = 64  # d = 64 n, the shape rule of arXiv 2402.07871 section 6.1 and arXiv 2502.05172 appendix A.3


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model as scaling laws see it; width and blocks need not be whole.

    Attributes:
        width: d.
        blocks: n.
        expansion: E.
        granularity: G.
        ffn: f, parameters of a dense FFN over d^2.
        vocab: V.
    """

    width: float
    blocks: float
    expansion: float
    granularity: float
    ffn: float
    vocab: int

    @property
    def num_experts(self) -> int:
        """Experts of a block, E G."""
        return round(self.expansion * self.granularity)

    @property
    def embedding(self) -> float:
        """Parameters of embedding and head."""
        return 2 * self.width * self.vocab

    @property
    def routing(self) -> float:
        """Parameters of all routers."""
        return self.blocks * self.width * self.expansion * self.granularity if self.expansion > 1 else 0.0

    @property
    def active_blocks(self) -> float:
        """Parameters of the blocks that a token uses: 12 or 13 d^2 n."""
        return (4 + self.ffn) * self.blocks * self.width**2

    @property
    def total_blocks(self) -> float:
        """Parameters of the blocks: (4 + f E) d^2 n."""
        return (4 + self.ffn * self.expansion) * self.blocks * self.width**2

    @property
    def active(self) -> float:
        """Parameters that a token uses, embedding and head included."""
        return self.embedding + self.active_blocks

    @property
    def total(self) -> float:
        """All parameters, embedding and head included."""
        return self.embedding + self.total_blocks


def sized_by_active(
    active: float,
    *,
    expansion: float,
    granularity: float,
    ffn: float,
    vocab: int,
    with_embedding: bool,
    width_per_block: float = WIDTH_PER_BLOCK,
) -> ModelSize:
    """The model with ``active`` parameters a token, of width ``width_per_block`` times its blocks.

    Args:
        active: N.
        expansion, granularity, ffn, vocab: as in `ModelSize`.
        with_embedding: whether N counts embedding and head.
        width_per_block: d over n.

    Raises:
        ValueError: N is not positive.
    """
    if not active > 0:
        raise ValueError(f"active parameters {active:g} must be positive")

    def of(blocks: float) -> ModelSize:
        return ModelSize(
            width=width_per_block * blocks,
            blocks=blocks,
            expansion=expansion,
            granularity=granularity,
            ffn=ffn,
            vocab=vocab,
        )

    high = (active / ((4 + ffn) * width_per_block**2)) ** (1 / 3)  # exact without embeddings
    if not with_embedding:
        return of(high)
    low = 0.0
    for _ in range(100):  # bisection: the count grows with the blocks
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle).active < active else (low, middle)
    return of(high)
