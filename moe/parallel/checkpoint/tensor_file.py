"""A safetensors file written tensor by tensor: bounded memory, and its sha256 without reading it again.

safetensors' own `save_file` wants all tensors at once. The format: 8 bytes with the length of a JSON header of names,
dtypes, shapes and offsets (https://github.com/huggingface/safetensors#format), then the data without gaps.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
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
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
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
        self._put(_bytes_of(tensor))

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
            _write_all(self._file, chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class StreamedTensorFile:
    """Writes a file whose tensors are not known beforehand: their data as they come, then the header into room kept for it.

    The format allows spaces after the header's JSON.

    Args:
        path: of the file.
        metadata: texts for its header.

    Attributes:
        num_bytes: of data so far.
    """

    HEADER_ROOM = 1 << 20
    _ENTRY = 120  # bytes of a header's entry besides the name; sizes of more than 2^63 do not occur

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self._metadata = path, metadata
        self.num_bytes = 0
        self._specs: dict[str, TensorSpec] = {}
        self._header_left = self.HEADER_ROOM - 1024
        self._file = path.open("wb", buffering=0)
        self._file.seek(self.HEADER_ROOM)

    def has_room_for(self, name: str) -> bool:
        """Whether the header takes another name."""
        return self._header_left >= len(name) + self._ENTRY

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor's data."""
        data = _bytes_of(tensor)
        self._specs[name] = TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape))
        self._header_left -= len(name) + self._ENTRY
        self.num_bytes += len(data)
        _write_all(self._file, data)

    def finish(self) -> None:
        """Write the header; sync and close the complete file."""
        header = _header(self._specs, self._specs, self._metadata)[8:]
        room = self.HEADER_ROOM - 8
        assert len(header) <= room, f"{len(self._specs)} names need {len(header)} bytes of header"
        self._file.seek(0)
        _write_all(self._file, memoryview(room.to_bytes(8, "little") + header.ljust(room)))
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close a file that is given up; nothing where it was finished."""
        self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(file: FileIO, data: memoryview) -> None:
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        while chunk:  # an unbuffered file may take a part
            chunk = chunk[file.write(chunk) :]


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
