"""GGUF files for llama.cpp whose blocks hold the codes and scales that a method chose.

llama.cpp's Q8_0 and Q4_0 are blocks of 32 columns with an fp16 scale d: values d q with q in -128 ... 127, and d (q - 8) with q in
0 ... 15. Those are the symmetric integer grids of 8 and 4 bits in groups of 32, if scales are stored as fp16. Quantised layers
are first written to a folder as compressed-tensors are; `finish` makes the file of it. Embeddings and unembedding are fp16.

Legend: Q reduced columns, G = Q / 32 blocks of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.models.folder import ModelFolder
from moe.models.gguf.architectures import MOE_ARCHITECTURES, choose_architecture
from moe.models.gguf.package import load_gguf
from moe.models.gguf.source import GGUFSource
from moe.models.gguf.tensors import PlannedTensor, plan_tensors
from moe.models.gguf.write import FILE_TYPES, write_file
from moe.quant.containers.compressed_tensors import CompressedTensors
from moe.quant.containers.container import Target, offered
from moe.quant.schemes import GGUF

BLOCK = 32


def _q8_0(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def _q4_0(codes: Tensor) -> Tensor:
    """The first half of a block in the low bits, the second in the high ones."""
    first, second = (codes + 8).to(torch.uint8).chunk(2, -1)
    return first | second << 4


# By bits: the type's name, and bytes of a block's codes (..., 32).
_TYPES: dict[int, tuple[str, Callable[[Tensor], Tensor]]] = {8: ("Q8_0", _q8_0), 4: ("Q4_0", _q4_0)}


class BlockStorage:
    """Layers' matrices as they are quantised, what is outside the layers in fp16, vectors and routers in fp32.

    Args:
        num_bits: 8 or 4.
        scales: how to get each tensor's scales, by name.
    """

    def __init__(self, num_bits: int, scales: dict[str, PlannedTensor]) -> None:
        self._type, self._pack = _TYPES[num_bits]
        self._scales = scales
        self._other = FILE_TYPES["fp16"]

    @property
    def file(self) -> str:
        """See `moe.models.gguf.write.Storage`."""
        return f"MOSTLY_{self._type}"

    def _is_quantized(self, tensor: PlannedTensor) -> bool:
        return tensor.layer >= 0 and not tensor.in_fp32

    def kind(self, tensor: PlannedTensor) -> Any:
        """See `moe.models.gguf.write.Storage`."""
        if self._is_quantized(tensor):
            return load_gguf().GGMLQuantizationType[self._type]
        return self._other.kind(tensor)

    def encode(self, tensor: PlannedTensor) -> Any:
        """See `moe.models.gguf.write.Storage`."""
        if not self._is_quantized(tensor):
            return self._other.encode(tensor)
        codes, scale = tensor.read(), self._scales[tensor.name].read()
        assert codes.dtype == torch.int8 and tuple(codes.shape) == tensor.shape, f"{tensor.name}: not codes"
        stored = scale.to(torch.float16)
        assert torch.equal(stored.float(), scale), f"{tensor.name}: scales are not those of fp16"
        packed = self._pack(codes.unflatten(-1, (-1, BLOCK)).contiguous())
        block = torch.cat((stored[..., None].contiguous().view(torch.uint8), packed), -1)
        return block.flatten(-2).numpy()


class Gguf(CompressedTensors):
    """See the module."""

    name = GGUF
    targets = tuple(architecture.like.name for architecture in MOE_ARCHITECTURES if architecture.like is not None)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of a block."""
        return torch.float16

    def check(self, target: Target) -> None:
        """4 or 8 bits in groups of 32, in architectures that llama.cpp computes."""
        load_gguf()
        if self.name not in target.scheme.containers:
            raise ValueError(
                f"--scheme {target.scheme.name} cannot be stored as {self.name}; use one of {offered(self.name)}, or --container "
                f"{target.scheme.containers[0]}"
            )
        if target.scheme.weights.group_size != BLOCK:
            raise ValueError(f"--container {self.name} has blocks of {BLOCK} columns; use --group-size {BLOCK}")
        if target.to not in self.targets:
            raise ValueError(f"--to {target.to!r} is not computed by llama.cpp; use one of {', '.join(self.targets)}")

    def finish(self, folder: Path, out: Path, check: Callable[[Path], None] | None = None) -> None:
        """Write the file; the folder stays."""
        model, storage = self.contents(folder)
        write_file(model, out, storage, check=check)

    def contents(self, folder: Path) -> tuple[GGUFSource, BlockStorage]:
        """What the file of a folder has in it, and how that is stored."""
        source = ModelFolder(folder)
        codes, scales = (GGUFSource(view) for view in self.views(source))
        planned = {tensor.name: tensor for tensor in plan_tensors(scales, choose_architecture(scales))}
        return codes, BlockStorage(self.read_scheme(source).weights.num_bits, planned)
