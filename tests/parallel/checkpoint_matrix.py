"""Which checkpoints `test_checkpoint_matrix` carries from one layout to another: 1, 2 and 4 ranks, EP 1, 2 and 4, ZeRO 0-3.

Every change of the number of ranks, of the expert-parallel degree and of the ZeRO stage occurs, and every pair of stages
in one direction or the other; in fp32, and for each change of the number of ranks in bf16. Optimizer states and weights
that DeepSpeed keeps in the host's memory go to and from there.
"""

from pathlib import Path
from typing import Any

from checkpoint_runs import Source, layout, read, write
from tiny_run import Layout

ONE = [Source("plain", layout(1, 1, 1)), Source("bf16", layout(1, 1, 0))]
TWO = [Source("plain", layout(2, 2, 0)), Source("plain", layout(2, 1, 2)), Source("bf16", layout(2, 2, 3))]
OFFLOADED = [
    Source("plain", Layout(world_size=2, ep_size=2, zero_stage=stage, offload=what))
    for stage, what in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer param"))
]
FOUR = [
    Source("plain", layout(4, 4, 1)),
    Source("plain", layout(4, 2, 3)),
    Source("plain", layout(4, 4, 0)),
    Source("bf16", layout(4, 2, 1)),
]
SOURCES = {1: ONE, 2: TWO + OFFLOADED, 4: FOUR}
PAIRS: list[tuple[Source, Layout]] = [
    (ONE[0], layout(4, 4, 3)),
    (ONE[0], layout(4, 2, 0)),
    (ONE[1], layout(4, 4, 2)),
    (TWO[0], layout(4, 4, 2)),
    (TWO[1], layout(4, 4, 1)),
    (TWO[1], layout(4, 2, 3)),
    (TWO[2], layout(4, 4, 1)),
    (FOUR[0], layout(4, 1, 2)),
    (FOUR[0], layout(2, 2, 3)),
    (FOUR[1], layout(2, 1, 0)),
    (FOUR[2], layout(2, 2, 1)),
    (FOUR[3], layout(2, 2, 3)),
    (TWO[0], layout(1, 1, 3)),
    (TWO[2], layout(1, 1, 0)),
    (FOUR[1], layout(1, 1, 1)),
    (FOUR[2], layout(1, 1, 2)),
    *((source, source.layout) for source in OFFLOADED),
    (OFFLOADED[0], layout(2, 1, 1)),
    (OFFLOADED[1], OFFLOADED[3].layout),
    (OFFLOADED[3], layout(2, 2, 0)),
    (TWO[0], OFFLOADED[2].layout),
]


def work(rank: int, world_size: int, root: Path) -> dict[Any, Any]:
    """Write what this number of ranks writes, unless it is there, and read what exists and is for it."""
    found: dict[Any, Any] = {}
    for source in SOURCES[world_size]:
        if not (root / source.name).exists():
            found[source] = write(root, source)
    for source, target in PAIRS:
        if target.world_size == world_size and (root / source.name).exists():
            found[source, target] = read(root, source, target)
    return found
