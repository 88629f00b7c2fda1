"""Fixtures of every test: one thread, a fixed seed, and memory from `moe.kernels` that is NaN until it is written."""

import os
import sys
import types
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from moe.kernels import grouped, ops, triton_ops  # noqa: F401  loaded before the poison is put in place

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)


class _PoisonedTorch(types.ModuleType):
    """`torch` as the kernel modules see it: uninitialised tensors come filled with NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _poisoned(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _poisoned(torch.empty_like(*args, **kwargs))


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten outputs of kernels show as NaN; nothing outside `moe.kernels` sees a difference."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moe.kernels.") and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", _PoisonedTorch("torch"))
    new_empty, take = torch.Tensor.new_empty, grouped._Scratch.take

    def poisoned_new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = new_empty(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poisoned(fresh) if caller.startswith("moe.kernels.") else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)
    # What a test or a call left in the scratch buffers must not reach the next one either.
    monkeypatch.setattr(grouped, "_scratch", grouped._Scratch())
    monkeypatch.setattr(grouped._Scratch, "take", lambda self, *args: _poisoned(take(self, *args)))
