"""A safetensors file written tensor by tensor: bounded memory, and its sha256 without reading it again.

safetensors' own `save_file` wants all tensors at once. The format: 8 bytes with the length of a JSON header of names,
dtypes, shapes and offsets (https://github.com/huggingface/safetensors#format), then the data without gaps.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moe.parallel.checkpoint.files import FileRecord

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 8 << 20  # bytes written and hashed at a time


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a file will hold under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFile:
    """Writes one file; use as a context manager, `write` the tensors in the order of ``names``, then take `finish`.

    Args:
        path: of the file.
        specs: what it will hold.
        metadata: texts for its header.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._path, self._specs = path, specs
        # Larger elements first: every tensor is then aligned.
        self.names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        self._next = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)
        self._put(_header(self.names, specs, metadata))

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor's data."""
        spec = self._specs[name]
        assert name == self.names[self._next], f"{name} is out of order"
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} is not what was announced"
        self._next += 1
        self._put(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def finish(self) -> FileRecord:
        """Sync and close the complete file."""
        assert self._next == len(self.names), f"{self.names[self._next]} was not written"
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return FileRecord(size=size, sha256=self._digest.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = memoryview(data)[start : start + _CHUNK]
            self._digest.update(chunk)
            while chunk:  # an unbuffered file may take a part
                chunk = chunk[self._file.write(chunk) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _header(names: Iterable[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        spec = specs[name]
        end = offset + spec.num_bytes
        entries[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write and sync a whole file of tensors that are there already."""
    specs = {name: TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(path, specs, metadata) as file:
        for name in file.names:
            file.write(name, tensors[name])
        return file.finish()
