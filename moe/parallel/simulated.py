"""One rank of a large job alone in one process: torch's fake process group, and collectives that are counted.

The real code runs: groups are created, models sharded, exchanges issued. Floating-point tensors live on the meta device, so
nothing is computed; the integers that decide sizes (which token goes where) are real CPU tensors. What other ranks would
send is not known, so the world is a mirror: every rank does what this one does. Then block r that arrives is the block
that this rank sends to itself, a sum over ranks is a product, and counts, splits and labels stay consistent.

All collectives of torch.distributed pass torch's dispatcher as operations of the namespace ``c10d``, where a dispatch mode
sees them; no function is replaced.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective that this rank took part in.

    Attributes:
        op: "all_to_all", or the name of torch's operation.
        ranks: global ranks of the group.
        bytes_to: of an all-to-all, bytes that this rank sends to each of ``ranks``, itself included; of others, (size,).
    """

    op: str
    ranks: tuple[int, ...]
    bytes_to: tuple[int, ...]


class SimulatedRanks(TorchDispatchMode):
    """Counts and mirrors collectives, and lets meta tensors meet CPU integers; made by `simulated_ranks`.

    Attributes:
        transfers: the collectives since the start, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; collectives are answered by the mirror."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(t.is_meta for t in tensors) and any(t.is_cpu for t in tensors) and func.overloadpacket is not _COPY:
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        group = next(
            dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)
        )  # fmt: skip
        ranks = tuple(dist.get_process_group_ranks(group))
        name = func.overloadpacket.__name__
        if name == "alltoall_base_":
            output, rows, _, receive, send = args[:5]
            self._all_to_all(output, rows, list(receive), list(send), ranks)
            # the fake group's handle, for which sizes do not matter
            empty = torch.empty(0)
            return func(empty, empty, args[2], [], [], *args[5:], **kwargs)
        tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
        if name == "allreduce_":
            for tensor in tensors:
                if not tensor.is_meta:
                    tensor.mul_(len(ranks))
        size = sum(tensor.nbytes for tensor in tensors)
        self.transfers.append(Transfer(op=name.strip("_"), ranks=ranks, bytes_to=(size,)))
        return func(*_on_cpu(args), **kwargs) if any(t.is_meta for t in tensors) else func(*args, **kwargs)

    def _all_to_all(
        self, output: Tensor, rows: Tensor, receive: list[int], send: list[int], ranks: tuple[int, ...]
    ) -> None:
        me, size = ranks.index(dist.get_rank()), len(ranks)
        send = send or [rows.shape[0] // size] * size
        receive = receive or [output.shape[0] // size] * size
        row_bytes = rows.nbytes // rows.shape[0] if rows.shape[0] else 0
        bytes_to = tuple(count * row_bytes for count in send)
        self.transfers.append(Transfer(op="all_to_all", ranks=ranks, bytes_to=bytes_to))
        if not output.is_meta:  # rows that come back are of other sizes, but they are meta
            assert receive == [send[me]] * size, (
                f"not a mirror: rank {me} sends itself {send[me]} and expects {receive}"
            )
            start = sum(send[:me])
            mine = rows[start : start + send[me]]
            output.copy_(torch.cat([mine] * size))


_COPY = torch.ops.aten._to_copy


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.is_cpu else value


def _on_cpu(args: Any) -> Any:
    """Empty CPU tensors in place of meta ones: the fake group knows no meta device, and looks at nothing."""
    return tree_map(lambda value: torch.empty(0) if isinstance(value, Tensor) else value, args)


@contextmanager
def simulated_ranks(rank: int, world_size: int) -> Iterator[SimulatedRanks]:
    """Be rank ``rank`` of ``world_size`` ranks that do not exist, inside the block.

    Raises:
        ValueError: this process is already in a process group.
    """
    if dist.is_initialized():
        raise ValueError("a simulation needs a process that is in no process group; run it outside of training")
    import deepspeed
    from deepspeed.utils import groups

    from moe.parallel.exchange import stages

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory all-reduce would be compiled at start, which takes a while and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    hook = sys.excepthook  # torch wraps it, once for each group that was ever made
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
        with SimulatedRanks() as simulation:
            yield simulation
    finally:
        for known in (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict()):
            known.clear()
        for known in (groups._EXPERT_PARALLEL_GROUP_RANKS, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):
            known.clear()
        stages._known.clear()
        deepspeed.comm.destroy_process_group()
        sys.excepthook = hook
