"""Our own form of schemes that no server runs: codes and scales under the names of `MoEForCausalLM`.

They are said to be simulated because what loads them (`moe.quant.load`) computes with dequantised weights and rounded activations.
transformers refuses the folder: its ``model_type`` is known to us alone. An unknown ``quant_method`` would not do: that
is skipped with a warning, and the weights would be random.

A parameter NAME is stored as ``NAME.codes`` (int8, float8_e4m3fn, or uint8 with an e2m1 code), ``NAME.scale`` in the dtype of the
checkpoint and, where it has zero points, ``NAME.zero`` int8; experts are stacked.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.models.folder import ModelFolder
from moe.quant.containers.container import Target, offered, take_name
from moe.quant.grids import Rounded, Scales
from moe.quant.options import QuantOptions
from moe.quant.rounded import RoundedLayer
from moe.quant.schemes import SIMULATED, Scheme

METHOD = "moe_simulated"
_CODES, _SCALE, _ZERO = ".codes", ".scale", ".zero"


class Simulated:
    """See the module."""

    name = SIMULATED
    targets = ("moe",)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's."""
        return dtype

    def check(self, target: Target) -> None:
        """Any scheme, in our own format."""
        if self.name not in target.scheme.containers:
            raise ValueError(
                f"--scheme {target.scheme.name} has no {self.name} form; those of {offered(self.name)} have one"
            )
        if target.to not in self.targets:
            raise ValueError(
                f"--to {target.to!r} does not go with --container {self.name}: no server runs it; use --to moe"
            )

    def write_layer(self, target: Target, layer: RoundedLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """See `Container`."""
        for name, tensor in layer.rest.items():
            yield prefix + name, tensor
        for name, rounded in layer.rounded.items():
            scale = rounded.scales.scale.to(self.scale_dtype(target.dtype))
            assert torch.equal(scale.float(), rounded.scales.scale), f"{name}: scales are not those of {scale.dtype}"
            yield prefix + name + _CODES, rounded.codes
            yield prefix + name + _SCALE, scale
            if rounded.scales.zero is not None:
                yield prefix + name + _ZERO, rounded.scales.zero.to(torch.int8)

    def quantization_config(self, target: Target) -> dict[str, Any]:
        """Scheme and groups."""
        return {
            "quant_method": METHOD,
            "scheme": target.scheme.name,
            "group_size": target.scheme.weights.group_size,
            "rotated": target.scheme.weights.rotated,
        }

    def finish(self, folder: Path, out: Path, check: Callable[[Path], None] | None = None) -> None:
        """See `Container`."""
        take_name(folder, out, check)

    def read_scheme(self, folder: ModelFolder) -> Scheme:
        """See `Container`."""
        values: dict[str, Any] = folder.config.quantization_config
        scheme = QuantOptions(scheme=values["scheme"], rotate=values["rotated"]).resolved()
        group_size = values["group_size"]
        return scheme if group_size == scheme.weights.group_size else scheme.with_group_size(group_size or 0)

    def read_layer(self, folder: ModelFolder, layer: int) -> RoundedLayer:
        """See `Container`."""
        grid, prefix = self.read_scheme(folder).weights, f"model.layers.{layer}."
        here = [name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)]
        rounded: dict[str, Rounded] = {}
        for name in (name.removesuffix(_CODES) for name in here if name.endswith(_CODES)):
            zero = folder.read(prefix + name + _ZERO).float() if name + _ZERO in here else None
            scales = Scales(scale=folder.read(prefix + name + _SCALE).float(), zero=zero)
            rounded[name] = Rounded(codes=folder.read(prefix + name + _CODES), scales=scales, grid=grid)
        parts = {name + suffix for name in rounded for suffix in (_CODES, _SCALE, _ZERO)}
        return RoundedLayer(
            rounded=rounded, rest={name: folder.read(prefix + name) for name in here if name not in parts}
        )
