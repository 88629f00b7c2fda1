"""The folder in which a quantisation is under way, from which a killed one goes on.

``OUT.quantizing/`` holds the settings, a file for each finished layer, and the residual stream before the next layer. A file is
complete or not there: it is written under another name first. The stream is written after the layer's file, so a kill between
the two repeats that layer, with the same result.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe.models.folder import ModelFolder
from moe.parallel.checkpoint.files import sync, write_bytes
from moe.parallel.checkpoint.tensor_file import write_tensors
from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.rounded import RoundedLayer

SUFFIX = ".quantizing"
_SETTINGS, _STREAM = "settings.json", "stream.safetensors"
_NEXT, _REPORT = "next_layer", "report"  # keys of the files' metadata
_CODES, _SCALE, _ZERO, _REST = "codes/", "scale/", "zero/", "rest/"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where the text is.

    Attributes:
        next_layer: which comes next.
        hidden_BLD: fp32 residual stream before it, in the quantised model.
        reference_BLD: of the first windows, in the model as it was.
    """

    next_layer: int
    hidden_BLD: Tensor
    reference_BLD: Tensor


class WorkFolder:
    """Finished parts of a quantisation; opening it makes it, or checks that what is there belongs to the same settings.

    Args:
        out: the folder that is to come out.
        settings: all that decides the result, as plain data.
        restart: remove what is there.

    Raises:
        ValueError: what is there has other settings, or is none of ours.
    """

    def __init__(self, out: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.path = out.with_name(out.name + SUFFIX)
        settings = json.loads(json.dumps(settings))  # as they come back
        if self.path.exists():
            found = _read_settings(self.path)
            if restart or not (self.path / _STREAM).is_file():  # nothing is lost
                shutil.rmtree(self.path)
            elif found != settings:
                raise ValueError(
                    f"{self.path} was begun with other settings: {_difference(found, settings)}; give the same ones to go on, "
                    "or remove it or pass --restart"
                )
        if not self.path.exists():
            fresh = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
            fresh.mkdir(parents=True)
            write_bytes(fresh / _SETTINGS, json.dumps(settings, indent=1).encode())
            fresh.rename(self.path)

    def read_stream(self) -> Stream | None:
        """Where to go on; ``None`` at the start."""
        path = self.path / _STREAM
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            next_layer = int(file.metadata()[_NEXT])
            return Stream(
                next_layer=next_layer,
                hidden_BLD=file.get_tensor("hidden_BLD"),
                reference_BLD=file.get_tensor("reference_BLD"),
            )

    def write_stream(self, stream: Stream) -> None:
        """Replace the stream."""
        tensors = {"hidden_BLD": stream.hidden_BLD, "reference_BLD": stream.reference_BLD}
        self._replace(_STREAM, tensors, {_NEXT: str(stream.next_layer)})

    def write_layer(self, layer: int, rounded: RoundedLayer, report: dict[str, Any]) -> None:
        """Keep a finished layer, and what is said of it."""
        tensors = {_REST + name: tensor for name, tensor in rounded.rest.items()}
        for name, matrix in rounded.rounded.items():
            tensors[_CODES + name], tensors[_SCALE + name] = matrix.codes, matrix.scales.scale
            if matrix.scales.zero is not None:
                tensors[_ZERO + name] = matrix.scales.zero
        self._replace(_layer_file(layer), tensors, {_REPORT: json.dumps(report)})

    def read_layer(self, layer: int, grid: Grid) -> RoundedLayer:
        """A finished layer, on ``grid``."""
        tensors = load_file(self.path / _layer_file(layer))
        rounded = {
            name: Rounded(
                codes=tensors[_CODES + name],
                scales=Scales(scale=tensors[_SCALE + name], zero=tensors.get(_ZERO + name)),
                grid=grid,
            )
            for name in _below(tensors, _CODES)
        }
        return RoundedLayer(rounded=rounded, rest={name: tensors[_REST + name] for name in _below(tensors, _REST)})

    def read_report(self, layer: int) -> dict[str, Any]:
        """What is said of a finished layer."""
        with safe_open(self.path / _layer_file(layer), framework="pt") as file:
            return json.loads(file.metadata()[_REPORT])

    def remove(self) -> None:
        """At the end."""
        shutil.rmtree(self.path)

    def _replace(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        partial = self.path / f".{name}"
        write_tensors(partial, tensors, metadata)
        os.replace(partial, self.path / name)
        sync(self.path)


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _below(tensors: Iterable[str], prefix: str) -> list[str]:
    """Names without the prefix, of those that have it; in order, so that files do not depend on the reader's."""
    return sorted(name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{path} is in the way, and was not made by `moe quantize`; remove or rename it") from None


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in sorted(names))


def fingerprint(source: ModelFolder) -> str:
    """A hash of a folder's config, and of names, sizes and times of its weight files.

    Not of the weights themselves, whose reading would take as long as quantising a small model.
    """
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for path in source.weight_files():
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def text_hash(*texts: Tensor | None) -> str:
    """A hash of token ids."""
    digest = hashlib.sha256()
    for ids_BL in texts:
        digest.update(b"-" if ids_BL is None else str(tuple(ids_BL.shape)).encode() + ids_BL.numpy().tobytes())
    return digest.hexdigest()
