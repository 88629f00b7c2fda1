"""The stages of an exchange: who talks to whom, straight or over nodes.

With nodes of L ranks, rank n * L + l first talks to the ranks of place l on all nodes, then to those of its own node.
"""

import os
from weakref import WeakKeyDictionary

import torch.distributed as dist

from moe.parallel.collectives import Group, Peers
from moe.parallel.exchange.config import ExchangeConfig

# By expert group, then node size: all layers share the groups that are made, as long as the expert group lives.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[int, list[Peers]]] = WeakKeyDictionary()


def stages_of(group: Group, rank: int, num_ranks: int, config: ExchangeConfig) -> list[Peers]:
    """The peers of each hop, in outward order; collective over the group the first time that it makes groups.

    Raises:
        ValueError: the node size does not divide the group.
    """
    everyone = [Peers(group=group, ranks=tuple(range(num_ranks)), rank=rank)]
    size = _node_size(num_ranks, config)
    if size is None:
        return everyone
    if num_ranks % size:
        raise ValueError(
            f"parallel.exchange.hierarchical={size} does not divide parallel.ep_size={num_ranks}; "
            "use the number of ranks per node, or 'off'"
        )
    if size in (1, num_ranks):  # all nodes are ranks, or there is one node
        return everyone
    whole = group or dist.group.WORLD
    assert whole is not None
    made = _known.setdefault(whole, {})
    if size not in made:
        global_ranks = dist.get_process_group_ranks(whole)
        node, place = divmod(rank, size)
        within = tuple(range(node * size, (node + 1) * size))
        between = tuple(range(place, num_ranks, size))
        # Created by their members alone, first all nodes, then all between them: no order can block.
        inner, outer = (
            dist.new_group([global_ranks[r] for r in ranks], use_local_synchronization=True)
            for ranks in (within, between)
        )
        made[size] = [Peers(group=outer, ranks=between, rank=rank), Peers(group=inner, ranks=within, rank=rank)]
    return made[size]


def _node_size(num_ranks: int, config: ExchangeConfig) -> int | None:
    """Ranks per node, or ``None`` for a straight exchange."""
    if isinstance(config.hierarchical, int):
        return config.hierarchical
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    spans_nodes = 1 < per_node < num_ranks and num_ranks % per_node == 0
    return per_node if config.hierarchical == "auto" and config.dedup and spans_nodes else None
