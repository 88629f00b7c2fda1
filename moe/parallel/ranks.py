"""The process group: who this process is, and the few things ranks say to each other outside of the model."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, world_size: global.
        device: where its model lives.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over all ranks, in fp64 on CPU and fp32 elsewhere; collective."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; collective."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks; collective, for small plain data."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: it builds caches, they find them."""
        if not self.is_main:
            dist.barrier()
        try:
            yield
        finally:
            if self.is_main:
                dist.barrier()


def init_ranks(device_type: str, timeout_seconds: float) -> Ranks:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun sets them).

    Args:
        device_type: "cpu" (gloo) or "cuda" (NCCL).
        timeout_seconds: after which a collective that not all ranks joined fails.
    """
    # DeepSpeed picks its accelerator when it is imported, and would take a GPU that this run was told to leave alone.
    os.environ["DS_ACCELERATOR"] = device_type
    import deepspeed

    quiet_deepspeed()
    # Its shared-memory all-reduce serves inference only, yet is compiled at start, which takes a while and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device_type == "cpu" else "nccl"
    deepspeed.init_distributed(
        backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_seconds)
    )
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def quiet_deepspeed() -> None:
    """DeepSpeed logs to stdout, which belongs to our own output: errors only, and on stderr."""
    # It calls functions that newer torch announces to rename; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    for name in ("DeepSpeed", "deepspeed"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)


def leave() -> None:
    """Destroy the process group; called by each rank at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()
