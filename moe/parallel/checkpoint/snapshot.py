"""A rank's share of a training state, copied to host memory: all that a running step has to wait for.

Parameters are put together one at a time, so beside the snapshot itself there is one whole parameter more in memory. The
snapshot is 12 bytes per parameter over the number of ranks (weight and two moments in fp32), kept and reused; beside a
GPU it is pinned.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.files import CheckpointError
from moe.parallel.checkpoint.layout import Holding, holdings

if TYPE_CHECKING:
    from moe.parallel.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank writes, and what it can say of what others write.

    Attributes:
        tensors: by key; views of a `HostMemory`.
        experts: the keys whose rows are experts.
        replicas: checksums, by key, of what this rank holds as well but another one writes.
        whole: by name, how many experts (or 1) the files of all ranks must have.
        num_steps: optimizer steps applied.
    """

    tensors: dict[str, Tensor]
    experts: set[str]
    replicas: dict[str, list[str]]
    whole: dict[str, int]
    num_steps: int


class HostMemory:
    """Buffers on the host that one snapshot after the other is copied into."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor's values in the buffer ``key``; from a GPU without waiting, see `wait`."""
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    @staticmethod
    def wait() -> None:
        """Until all copies are complete."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()


def take_snapshot(engine: "Engine", memory: HostMemory) -> Snapshot:
    """Copy this rank's share of weights, moments and buffers, and its random states. Collective.

    Raises:
        CheckpointError: an assembled weight is not the one that this rank computes with. Raised on that rank alone, after
            all collectives.
    """
    from moe.parallel.state import (
        computes_with,
        full_moment,
        full_weight,
        link_moments,
        moments_of,
        num_optimizer_steps,
    )

    rank, num_steps = dist.get_rank(), num_optimizer_steps(engine)
    if num_steps:
        link_moments(engine)
    shot = Snapshot(tensors={}, experts=set(), replicas={}, whole={}, num_steps=num_steps)
    strangers = []

    def keep(kind: str, holding: Holding, tensor: Tensor) -> None:
        key = f"{kind}/{holding.key}"
        shot.whole[f"{kind}/{holding.name}"] = holding.whole_shape(engine.ep_size)[0] if holding.is_expert else 1
        if holding.writer == rank:
            shot.tensors[key] = memory.copy(key, tensor)
            if holding.is_expert:
                shot.experts.add(key)
        elif engine.zero_stage == 0:  # from stage 1 on no number of the optimizer's is held twice
            shot.replicas[key] = checksums(tensor, holding.is_expert)

    for holding in holdings(engine):
        weight = full_weight(engine, holding.parameter)
        if holding.writer == rank and not computes_with(holding.parameter, weight):
            strangers.append(holding.key)
        keep("weight", holding, weight)
        for kind in moments_of(engine, holding.parameter) if num_steps else ():
            keep(kind, holding, full_moment(engine, holding.parameter, kind))
    _add_buffers(engine, memory, shot)
    shot.tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        shot.tensors["rng_cuda"] = torch.cuda.get_rng_state()
    memory.wait()
    if strangers:
        raise CheckpointError(
            f"rank {rank}: the optimizer's weight of {strangers[0]} is not the one that the model has"
        )
    return shot


def _add_buffers(engine: "Engine", memory: HostMemory, shot: Snapshot) -> None:
    persistent = engine.model.state_dict(keep_vars=True)
    for name, buffer in engine.model.named_buffers():
        if name in persistent:
            key = f"buffer/{name}"
            shot.whole[key] = 1
            if dist.get_rank() == 0:
                shot.tensors[key] = memory.copy(key, buffer)
            else:
                shot.replicas[key] = checksums(buffer, is_expert=False)
