"""Counts the bytes of live tensors while code runs: on CPU, on a GPU, or on the meta device where nothing is allocated.

Process memory on CPU is noisy (allocator caches, libraries), and a meta run has none. So storages are followed from the
operation that first returns them to the death of their last reference, which is what an allocator would have to hold
without fragmentation. Temporary memory inside one operation (a matmul's workspace) is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Use as a context manager around everything that allocates, the making of the model included.

    Args:
        device_types: devices whose storages count.

    Attributes:
        live: bytes of the storages that were seen and still exist.
        peak: largest ``live`` since the start or the last `restart_peak`.
        live_by_tag: ``live`` by the tag that was set when a storage was first seen (see `tagged`).
    """

    def __init__(self, *device_types: str) -> None:
        super().__init__()
        self.device_types = device_types
        self.live = self.peak = 0
        self.live_by_tag: Counter[str] = Counter()
        self._tag = ""
        self._known: dict[int, tuple[int, str]] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and follow the storages it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type in self.device_types:
                self._see(leaf)
        return result

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Account storages that are first seen in the block to ``tag``; blocks nest."""
        before, self._tag = self._tag, tag
        try:
            yield
        finally:
            self._tag = before

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors, which outlive the block, nor views of them."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def restart_peak(self) -> None:
        """Let ``peak`` start from what is live now."""
        self.peak = self.live

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        before, tag = self._known.get(key, (0, self._tag))
        if key not in self._known:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        elif size == before:
            return
        self._known[key] = size, tag  # one that is known may have been resized
        self._add(size - before, tag)

    def _forget(self, key: int) -> None:
        size, tag = self._known.pop(key)
        del self._references[key]
        self._add(-size, tag)

    def _add(self, size: int, tag: str) -> None:
        self.live += size
        self.live_by_tag[tag] += size
        self.peak = max(self.peak, self.live)
