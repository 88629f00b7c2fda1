"""Hugging Face model folders, read and written tensor by tensor, so that a conversion never holds a whole model.

`ModelFolder` reads one tensor at a time from its safetensors shards. `FolderWriter` appends tensors to shards as they come;
the folder gets its name when it is complete, so a killed conversion leaves nothing that looks like a model.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moe.parallel.checkpoint.tensor_file import StreamedTensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What makes text of tokens and tokens of text, and the settings of `generate`: carried over as they are.
SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class ModelFolder:
    """Reads a folder with ``config.json`` and safetensors weights.

    Args:
        path: of the folder.

    Raises:
        ValueError: no folder, no config, no safetensors weights, or a shard that is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{str(path)!r} has no config.json; give the folder of a Hugging Face model")
        self._files = self._weight_map()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        import moe.models  # noqa: F401  (registers our architecture)

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as problem:
            raise ValueError(f"{self.path / 'config.json'} cannot be read: {problem}") from None

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a floating-point tensor, without reading it."""
        with self._open(name) as file:
            return _DTYPES[file.get_slice(name).get_dtype()]

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype that it is stored in, on CPU.

        Raises:
            ValueError: it is not there, or its file is damaged; names both.
        """
        with self._open(name) as file:
            try:
                return file.get_tensor(name)
            except (SafetensorError, ValueError, RuntimeError, OSError) as problem:
                raise ValueError(f"{self.path / self._files[name]}: tensor {name} is damaged: {problem}") from None

    def sidecars(self) -> list[Path]:
        """Files of the tokenizer, its chat template and the generation config."""
        return [self.path / name for name in SIDECARS if (self.path / name).is_file()]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files())

    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return [self.path / name for name in sorted(set(self._files.values()))]

    def _open(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self.path} has no tensor {name}")
        path = self.path / self._files[name]
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as problem:
            raise ValueError(f"{path} is damaged, so tensor {name} cannot be read: {problem}") from None

    def _weight_map(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError) as problem:
                raise ValueError(f"{index} is damaged: {problem!r}") from None
            if gone := sorted({file for file in files.values() if not (self.path / file).is_file()}):
                raise ValueError(f"{self.path} lacks {', '.join(gone)}, which {INDEX} names; fetch the model again")
            return files
        single = self.path / SINGLE
        if not single.is_file():
            raise ValueError(
                f"{self.path} has neither {SINGLE} nor {INDEX}; only safetensors weights are read: load and "
                "`save_pretrained` the model once to get them"
            )
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError) as problem:
            raise ValueError(f"{single} is damaged: {problem}") from None


class FolderWriter:
    """Writes a folder that appears under its name when it is complete; use as a context manager.

    Args:
        out: the folder to make.
        shard_bytes: a new weights file begins before one would get larger, unless one tensor alone is.

    Raises:
        ValueError: ``out`` exists.
    """

    def __init__(self, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out)
        if self.out.exists():
            raise ValueError(f"{self.out} exists; remove it or choose another folder")
        self.partial = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex}")
        self._shard_bytes = shard_bytes
        self._shards: list[StreamedTensorFile] = []
        self._files: dict[str, int] = {}
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        assert name not in self._files, f"{name} was written already"
        size = tensor.numel() * tensor.element_size()
        if not self._shards or not self._fits(self._shards[-1], name, size):
            if self._shards:
                self._shards[-1].finish()
            self._shards.append(StreamedTensorFile(self.partial / f"shard-{len(self._shards)}", {"format": "pt"}))
        self._shards[-1].write(name, tensor)
        self._files[name] = len(self._shards) - 1
        self._total += size

    def _fits(self, shard: StreamedTensorFile, name: str, size: int) -> bool:
        return shard.num_bytes + size <= self._shard_bytes and shard.has_room_for(name)

    def finish(
        self,
        config: PreTrainedConfig,
        sidecars: list[Path],
        texts: dict[str, str] | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write config, copied files and texts (by file name), let ``check`` see the folder, and give it its name."""
        self._finish_shards()
        config.save_pretrained(self.partial)
        for file in sidecars:
            shutil.copyfile(file, self.partial / file.name)
        for name, text in (texts or {}).items():
            (self.partial / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(self.partial)
        self.partial.rename(self.out)
        return self.out

    def _finish_shards(self) -> None:
        assert self._shards, "a model without weights"
        self._shards[-1].finish()
        count = len(self._shards)
        files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for shard, file in zip(self._shards, files, strict=True):
            shard.path.rename(self.partial / file)
        if count > 1:
            weight_map = {name: files[shard] for name, shard in self._files.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def __enter__(self) -> Self:
        self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards:
            shard.close()
        shutil.rmtree(self.partial, ignore_errors=True)  # nothing is there after `finish`
