"""What a container is: names, dtypes and a config by which a quantised model lies in a Hugging Face folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.quant.rounded import RoundedLayer
from moe.quant.schemes import SCHEMES, Scheme


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written.

    Attributes:
        config: the model; its weights need no rewriting for the format ``to``, since it was read from a folder in it.
        scheme: what its layers are quantised to.
        to: a key of `moe.models.stock.FORMATS`.
        dtype: of the checkpoint.
    """

    config: MoEConfig
    scheme: Scheme
    to: str
    dtype: torch.dtype


class Container(Protocol):
    """A way to store quantised layers; tensors outside the layers are stored as in any folder."""

    @property
    def name(self) -> str:
        """Its key in `CONTAINERS`."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Values of `Target.to` that it can write."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the scales of a checkpoint of ``dtype`` are stored in."""

    def check(self, target: Target) -> None:
        """Raise a ValueError where it cannot hold that: names what it can hold, or which container can."""

    def write_layer(self, target: Target, layer: RoundedLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one decoder layer, whose scales have values that ``scale_dtype`` holds.

        Args:
            target: checked.
            layer: what to store.
            prefix: ``model.layers.N.``.
        """

    def quantization_config(self, target: Target) -> dict[str, Any]:
        """``quantization_config`` of the folder's config.json."""

    def finish(self, folder: Path, out: Path, check: Callable[[Path], None] | None = None) -> None:
        """Make ``out`` of a complete folder: for most, give it that name.

        Args:
            folder: is there no more afterwards, or may be removed.
            out: a folder; of GGUF, a file.
            check: called with what is going to be ``out`` before it gets that name; what it raises stops it.

        Raises:
            ValueError: ``out`` exists.
        """

    def read_scheme(self, folder: ModelFolder) -> Scheme:
        """What the folder's layers are quantised to.

        Raises:
            ValueError: to none of `SCHEMES`.
        """

    def read_layer(self, folder: ModelFolder, layer: int) -> RoundedLayer:
        """One layer of a folder that `write_layer` and `quantization_config` made.

        Raises:
            ValueError: a tensor is missing or damaged; names it.
        """


def offered(container: str) -> str:
    """Schemes that a container holds, for messages."""
    return ", ".join(name for name, scheme in SCHEMES.items() if container in scheme.containers)


def take_name(folder: Path, out: Path, check: Callable[[Path], None] | None) -> None:
    """Rename a folder that ``check`` does not object to.

    Raises:
        ValueError: ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    if check is not None:
        check(folder)
    folder.rename(out)
