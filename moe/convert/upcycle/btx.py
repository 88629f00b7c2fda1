"""Branch-Train-MiX: models that were trained apart from one seed become the experts of one (arXiv 2403.07816).

FFNs become experts and every other tensor is the mean over the models; `average` computes it in fp32. With more experts than
models, each model gives a run of equal experts.
"""

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.options import UpcycleOptions
from moe.models.folder import ModelFolder

# Of a config: where it was stored and by which version, not what the model is.
_NOT_COMPARED = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
_CHUNK = 1 << 24  # entries of a tensor that are averaged at a time


class BranchTrainMix(Upcycler):
    """Experts are the FFNs of several models."""

    name = "btx"
    summary = (
        "The FFNs of several dense models become experts, and all other tensors are averaged (Branch-Train-MiX, "
        "arXiv 2403.07816)."
    )
    several_sources = True

    def check(self, options: UpcycleOptions, width: int, num_sources: int) -> None:
        """Two models or more, and equally many experts of each."""
        super().check(options, width, num_sources)
        if num_sources < 2:
            raise ValueError("--method btx mixes several models; give the others with --also FOLDER")
        if options.num_experts % num_sources:
            raise ValueError(f"--experts {options.num_experts} is not a multiple of the {num_sources} models")

    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Never: the models differ."""
        return False

    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """E / n experts of each of the n models, in their order."""
        for source in sources:
            yield from [source] * (options.num_experts // len(sources))


def check_alike(folders: Sequence[ModelFolder]) -> None:
    """Check that models have the same config, tensors and shapes, so that their tensors can be averaged.

    Raises:
        ValueError: names the model and the first field or tensor that differs from the first model's.
    """
    first, *others = folders
    expected = _compared(first)
    for other in others:
        found = _compared(other)
        for key in ("model_type", *sorted(expected.keys() | found.keys())):
            if expected.get(key) != found.get(key):
                raise ValueError(
                    f"{other.path} has {key}={found.get(key)!r}, and {first.path} has {expected.get(key)!r}; "
                    "models that are mixed must be of one kind"
                )
        if missing := sorted(set(first.names) ^ set(other.names)):
            raise ValueError(f"{missing[0]} is in one of {first.path} and {other.path} only")
        for name in first.names:
            if first.shape(name) != other.shape(name):
                raise ValueError(
                    f"{name} has shape {other.shape(name)} in {other.path} and {first.shape(name)} in {first.path}"
                )
        if _vocabulary(first) != _vocabulary(other):
            raise ValueError(f"the tokenizers of {other.path} and {first.path} differ; tokens must mean the same")


def _vocabulary(folder: ModelFolder) -> object:
    """What decides which text a token is; other entries of a tokenizer's files do not matter here."""
    modern, older = folder.path / "tokenizer.json", folder.path / "tokenizer.model"
    if modern.is_file():
        return json.loads(modern.read_text(encoding="utf-8"))["model"].get("vocab")
    return older.read_bytes() if older.is_file() else None


def _compared(folder: ModelFolder) -> dict[str, object]:
    values = folder.config.to_dict()
    return {key: value for key, value in values.items() if key not in _NOT_COMPARED}


def average(folders: Sequence[ModelFolder], name: str) -> Tensor:
    """The mean of a tensor over models, in fp32, in the dtype that the first one has.

    In chunks: embeddings may be the largest tensor of all, and are mapped files in each model.
    """
    tensors = [folder.read(name).reshape(-1) for folder in folders]
    mean = torch.empty_like(tensors[0])
    for start in range(0, mean.numel(), _CHUNK):
        total = tensors[0][start : start + _CHUNK].float()
        for other in tensors[1:]:
            total = total + other[start : start + _CHUNK].float()
        mean[start : start + _CHUNK] = (total / len(tensors)).to(mean.dtype)
    return mean.view(folders[0].shape(name))
