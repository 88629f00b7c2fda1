"""Bytes that an exchange moves between ranks: counted at the collective, and computed from a routing or its expectation.

What stays on a rank is not counted. Kinds are the names of collectives in `moe.parallel.trace`, without hop and chunk.

Legend: T tokens, N assignments, K experts per token, E experts, W ranks, L ranks per node.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.parallel import trace
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.payload import PAYLOADS
from moe.types import Routing

_DISPATCH = ("forward dispatch rows", "backward dispatch rows")
_COMBINE = ("forward combine rows", "backward combine rows")
_WEIGHTS = ("forward dispatch weights", "backward combine weights")
_LABELS = "forward dispatch labels"
_COUNTS = "forward dispatch counts"
_NUMBER_BYTES = 4  # of a label or a weight
_COUNT_BYTES = 2 * 8  # pairs and assignments of a chunk


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes sent to other ranks of a forward and its backward.

    Attributes:
        intra, inter: by kind, within nodes and between them.
    """

    intra: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inter: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def total(self, word: str = "") -> float:
        """Bytes on both links of the kinds whose names contain ``word``, such as "dispatch" or "backward"."""
        return sum(number for link in (self.intra, self.inter) for kind, number in link.items() if word in kind)


@contextmanager
def count_bytes(node_size: int) -> Iterator[Volume]:
    """Add up what this rank sends in the exchanges that run inside the block.

    ``node_size``: L; rank r of the expert group is on node r // L.
    """
    volume = Volume()

    def add(collective: trace.Collective) -> None:
        for peer, units in zip(collective.peers, collective.send, strict=False):
            if peer != collective.rank:
                link = volume.intra if peer // node_size == collective.rank // node_size else volume.inter
                link[collective.name.partition(",")[0]] += units * collective.unit_bytes

    with trace.observe(add):
        yield volume


@dataclass(frozen=True, kw_only=True)
class _Units:
    """What leaves a rank in an outward stage, per link: rows, assignments, and peers."""

    pairs: float
    assignments: float
    peers: int


def exchange_bytes(
    routing: Routing,
    rank: int,
    num_ranks: int,
    dim: int,
    dtype: torch.dtype,
    config: ExchangeConfig,
    node_size: int | None = None,
) -> Volume:
    """What the tokens of one rank make all ranks send, exactly; summed over ranks, it is what `count_bytes` counts.

    Args:
        routing: of the rank's tokens.
        rank, num_ranks: its place in the expert group, and W.
        dim, dtype: of the rows of the model.
        config: options; "auto" is two-stage where nodes are smaller than the group.
        node_size: L; by default all ranks are on one node.
    """
    size = num_ranks if node_size is None else node_size
    ranks_N = routing.expert_ids_N // (routing.num_experts // num_ranks)
    node, place = divmod(rank, size)

    def units(selected_N: Tensor, places_N: Tensor, num_places: int, peers: int) -> _Units:
        """Of the assignments that move in a stage: a row for each (token, place), or one for each."""
        chosen_N = (routing.token_ids_N * num_places + places_N)[selected_N]
        pairs = chosen_N.unique().numel() if config.dedup else chosen_N.numel()
        return _Units(pairs=pairs, assignments=chosen_N.numel(), peers=peers)

    nodes_N = ranks_N // size
    if _is_two_stage(config, num_ranks, size):
        inter = units(nodes_N != node, nodes_N, num_ranks // size, num_ranks // size - 1)
        intra = units(ranks_N % size != place, ranks_N, num_ranks, size - 1)
    else:
        inter = units(nodes_N != node, ranks_N, num_ranks, num_ranks - size)
        intra = units((nodes_N == node) & (ranks_N != rank), ranks_N, num_ranks, size - 1)
    return _volume(intra, inter, dim, dtype, config)


def expected_bytes(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    num_ranks: int,
    dim: int,
    dtype: torch.dtype,
    config: ExchangeConfig,
    node_size: int | None = None,
) -> Volume:
    """The mean of `exchange_bytes` where every token has K different experts, all sets being equally likely."""
    size = num_ranks if node_size is None else node_size

    def units(num_places: int, reachable: int, peers: int) -> _Units:
        """``reachable`` of ``num_places`` equal parts of the experts are elsewhere."""
        assignments = num_tokens * top_k * reachable / num_places
        missed = math.comb(num_experts - num_experts // num_places, top_k) / math.comb(num_experts, top_k)
        pairs = num_tokens * reachable * (1 - missed) if config.dedup else assignments
        return _Units(pairs=pairs, assignments=assignments, peers=peers)

    if _is_two_stage(config, num_ranks, size):
        num_nodes = num_ranks // size
        inter = units(num_nodes, num_nodes - 1, num_nodes - 1)
        intra = units(num_ranks, num_ranks - num_nodes, size - 1)
    else:
        inter = units(num_ranks, num_ranks - size, num_ranks - size)
        intra = units(num_ranks, size - 1, size - 1)
    return _volume(intra, inter, dim, dtype, config)


def _is_two_stage(config: ExchangeConfig, num_ranks: int, node_size: int) -> bool:
    return config.dedup and config.hierarchical != "off" and 1 < node_size < num_ranks


def _volume(intra: _Units, inter: _Units, dim: int, dtype: torch.dtype, config: ExchangeConfig) -> Volume:
    row_bytes = PAYLOADS[config.payload].row_bytes(dim, dtype)
    found = []
    for units in (intra, inter):
        kinds = dict.fromkeys((*_DISPATCH, *_COMBINE), units.pairs * row_bytes)
        kinds[_LABELS] = units.assignments * _NUMBER_BYTES
        if config.dedup:  # a plain exchange applies the weights at home
            kinds |= dict.fromkeys(_WEIGHTS, units.assignments * _NUMBER_BYTES)
        kinds[_COUNTS] = units.peers * config.overlap_chunks * _COUNT_BYTES
        found.append(kinds)
    return Volume(intra=found[0], inter=found[1])
