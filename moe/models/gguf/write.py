"""Writes GGUF files, one tensor in memory at a time but for the MoE of one layer."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.models.folder import ModelFolder
from moe.models.gguf.architectures import Architecture, choose_architecture
from moe.models.gguf.metadata import hyperparameters
from moe.models.gguf.package import load_gguf
from moe.models.gguf.source import GGUFSource
from moe.models.gguf.tensors import PlannedTensor, plan_tensors
from moe.models.gguf.vocabulary import Vocabulary, read_vocabulary


class Storage(Protocol):
    """How the tensors of a file are stored."""

    @property
    def file(self) -> str:
        """Name in ``gguf.LlamaFileType``."""

    def kind(self, tensor: PlannedTensor) -> Any:
        """``gguf.GGMLQuantizationType`` of a tensor."""

    def encode(self, tensor: PlannedTensor) -> Any:
        """Its bytes as a numpy array, read now."""


@dataclass(frozen=True, kw_only=True)
class FileType:
    """All matrices alike: names in ``gguf.GGMLQuantizationType`` and ``gguf.LlamaFileType``."""

    matrices: str
    file: str

    def kind(self, tensor: PlannedTensor) -> Any:
        """See `Storage`."""
        return storage_type(tensor, self.matrices)

    def encode(self, tensor: PlannedTensor) -> Any:
        """See `Storage`."""
        values = tensor.read()
        assert tuple(values.shape) == tensor.shape, f"{tensor.name}: {tuple(values.shape)} is not {tensor.shape}"
        return encode(tensor.name, values, self.kind(tensor))


# Vectors, routers and gates are always fp32. Fewer bits: run llama.cpp's own quantizer on an fp16 or bf16 file.
FILE_TYPES = {
    "fp32": FileType(matrices="F32", file="ALL_F32"),
    "fp16": FileType(matrices="F16", file="MOSTLY_F16"),
    "bf16": FileType(matrices="BF16", file="MOSTLY_BF16"),
    "q8_0": FileType(matrices="Q8_0", file="MOSTLY_Q8_0"),
}


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """What was written.

    Attributes:
        path: the file.
        architecture: value of ``general.architecture``.
        vocabulary: pre-tokenizer type of llama.cpp, or ``None`` where the file has no tokenizer.
        num_tensors: in the file.
        num_bytes: its size.
    """

    path: Path
    architecture: str
    vocabulary: str | None
    num_tensors: int
    num_bytes: int


def write_gguf(
    source: Path,
    out: Path,
    dtype: str = "fp16",
    progress: Callable[[int, int], None] | None = None,
    no_vocabulary: bool = False,
    check: Callable[[Path], None] | None = None,
) -> GGUFFile:
    """Write a model folder as one GGUF file, which appears under its name when it is complete and checked.

    Args:
        source: folder of a model of ours, of a stock MoE, or of a dense decoder.
        out: the file to make.
        dtype: a key of `FILE_TYPES`. A matrix whose rows do not divide into blocks of 32 is fp16 where that is "q8_0".
        progress: called with tensors done and in all.
        no_vocabulary: leave the tokenizer out, for one that llama.cpp does not have; users of the file then bring their own.
            A folder without a tokenizer gives such a file in any case.
        check: called with the complete file before it gets its name; what it raises makes the file vanish.

    Raises:
        ValueError: no package ``gguf``, ``out`` exists, or the model or its tokenizer does not fit llama.cpp.
    """
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(FILE_TYPES)}")
    load_gguf()
    model = GGUFSource(ModelFolder(source))
    return write_file(model, out, FILE_TYPES[dtype], progress, no_vocabulary, check)


def write_file(
    model: GGUFSource,
    out: Path,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
    no_vocabulary: bool = False,
    check: Callable[[Path], None] | None = None,
) -> GGUFFile:
    """`write_gguf` of a model that is open, its tensors stored in any way."""
    gguf = load_gguf()
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another file")
    architecture = choose_architecture(model)
    vocabulary = None if no_vocabulary else read_vocabulary(model)
    plan = plan_tensors(model, architecture)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    writer = gguf.GGUFWriter(partial, architecture.name)
    try:
        _add_keys(writer, model, architecture, vocabulary, storage.file)
        _write(writer, plan, storage, progress)
        writer.close()
        if check is not None:
            check(partial)
        partial.rename(out)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return GGUFFile(
        path=out,
        architecture=architecture.name,
        vocabulary=None if vocabulary is None else vocabulary.pre_tokenizer,
        num_tensors=len(plan),
        num_bytes=out.stat().st_size,
    )


def _add_keys(
    writer: Any, model: GGUFSource, architecture: Architecture, vocabulary: Vocabulary | None, file_type: str
) -> None:
    gguf = load_gguf()
    writer.add_type("model")
    writer.add_name(model.folder.path.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in hyperparameters(model, architecture).items():
        add[type(value)](f"{architecture.name}.{key}", value)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        vocabulary.add_to(writer)


def storage_type(tensor: PlannedTensor, matrices: str) -> Any:
    """``gguf.GGMLQuantizationType`` of a tensor in a file of that type of matrices."""
    gguf = load_gguf()
    chosen = gguf.GGMLQuantizationType["F32" if tensor.in_fp32 else matrices]
    block = gguf.GGML_QUANT_SIZES[chosen][0]
    return chosen if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def encode(name: str, tensor: Tensor, kind: Any) -> Any:
    """The bytes of a tensor as a numpy array.

    Raises:
        ValueError: it has a value that the type cannot hold; names it.
    """
    gguf = load_gguf()
    values = tensor.float().contiguous()
    low, high = values.aminmax()
    limit = torch.finfo(torch.float16 if kind == gguf.GGMLQuantizationType.F16 else torch.float32).max
    if not max(-low, high) <= limit:  # also where one is NaN
        raise ValueError(
            f"tensor {name} has values that {kind.name} cannot hold; choose bf16 or fp32, or check the model"
        )
    return gguf.quants.quantize(values.numpy(), kind)


def _write(
    writer: Any, plan: list[PlannedTensor], storage: Storage, progress: Callable[[int, int], None] | None
) -> None:
    gguf = load_gguf()
    for tensor in plan:
        kind = storage.kind(tensor)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = torch.Size(tensor.shape).numel() // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, None, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(plan, 1):
        writer.write_tensor_data(storage.encode(tensor))
        if progress is not None:
            progress(done, len(plan))
