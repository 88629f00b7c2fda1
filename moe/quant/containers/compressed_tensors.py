"""compressed-tensors 0.20: what vLLM, SGLang and transformers load, in a stock architecture's folder.

Each expert's projection is a matrix of its own. Formats and tensors, for a weight (P, Q) in groups of g:

    pack-quantized         weight_packed (P, ceil(Q bits / 32)) int32, weight_scale (P, Q / g), weight_shape (2,) int64
    int-quantized          weight (P, Q) int8 whatever the bits, weight_scale (P, Q / g)
    float-quantized        weight (P, Q) float8_e4m3fn, weight_scale (P, 1)
    mxfp4-pack-quantized   weight_packed (P, Q / 2) uint8, the first code in the low bits, weight_scale (P, Q / 32) uint8 exponents

Scales are in the dtype of the checkpoint. The package itself is not needed; tests compare with it.

Legend: P output rows, Q reduced columns, G groups of Q.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.kernels.quantized import pack_int32, unpack_int32
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.decoder import decoder_config
from moe.models.stock.family import StockFormat
from moe.quant.containers.container import Target, offered, take_name
from moe.quant.containers.parts import WEIGHT, Part, PartFolder, join, split
from moe.quant.grids import Fp8Grid, Grid, IntGrid, Mxfp4Grid
from moe.quant.rounded import RoundedLayer
from moe.quant.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme

_EXPONENT_BIAS = 127
_SCALE = ".weight_scale"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a format stores a matrix.

    Attributes:
        format: its name.
        pack: from codes (P, Q), scale (P, G) in the dtype of the checkpoint, and bits, to tensors by suffix.
        codes: the inverse, from a reader of a matrix's tensors by suffix, and bits.
        scale: from the stored scale to fp32.
    """

    format: str
    pack: Callable[[Tensor, Tensor, int], dict[str, Tensor]]
    codes: Callable[[Callable[[str], Tensor], int], Tensor]
    scale: Callable[[Tensor], Tensor] = Tensor.float


def _pack_words(codes: Tensor, scale: Tensor, num_bits: int) -> dict[str, Tensor]:
    return {
        ".weight_packed": pack_int32(codes, num_bits),
        _SCALE: scale,
        ".weight_shape": torch.tensor(codes.shape),
    }


def _pack_nibbles(codes: Tensor, scale: Tensor, num_bits: int) -> dict[str, Tensor]:
    _, exponent = torch.frexp(scale.float())  # 2 ** n is 0.5 times 2 ** (n + 1)
    return {
        ".weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4,
        _SCALE: (exponent - 1 + _EXPONENT_BIAS).to(torch.uint8),
    }


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _power(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape), exponent.int() - _EXPONENT_BIAS)


def _plain(codes: Tensor, scale: Tensor, num_bits: int) -> dict[str, Tensor]:
    return {WEIGHT: codes, _SCALE: scale}


# By the grid of the weights and whether activations are quantised, as the package infers the format (``infer_module_format``).
_PACKINGS: dict[tuple[type[Grid], bool], Packing] = {
    (IntGrid, False): Packing(
        format="pack-quantized",
        pack=_pack_words,
        codes=lambda read, bits: unpack_int32(read(".weight_packed"), bits, int(read(".weight_shape")[1])),
    ),
    (IntGrid, True): Packing(format="int-quantized", pack=_plain, codes=lambda read, bits: read(WEIGHT)),
    (Fp8Grid, True): Packing(format="float-quantized", pack=_plain, codes=lambda read, bits: read(WEIGHT)),
    (Mxfp4Grid, False): Packing(
        format="mxfp4-pack-quantized",
        pack=_pack_nibbles,
        codes=lambda read, bits: _unpack_nibbles(read(".weight_packed")),
        scale=_power,
    ),
}


def packing_of(scheme: Scheme) -> Packing:
    """How a scheme is stored."""
    return _PACKINGS[type(scheme.weights), scheme.activations is not None]


class CompressedTensors:
    """See the module."""

    name = COMPRESSED_TENSORS
    targets = tuple(name for name in FORMATS if name != "moe")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's."""
        return dtype

    def check(self, target: Target) -> None:
        """Schemes that servers run, in architectures that they know."""
        if self.name not in target.scheme.containers:
            raise ValueError(
                f"--scheme {target.scheme.name} cannot be stored as {self.name}, since no server runs experts in it; use one of "
                f"{offered(self.name)}, or --container {target.scheme.containers[0]}"
            )
        if target.to not in self.targets:
            raise ValueError(
                f"--to {target.to!r} is no architecture that servers load; use one of {', '.join(self.targets)}, or --container "
                "simulated"
            )

    def write_layer(self, target: Target, layer: RoundedLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """See `Container`."""
        packing, num_bits = packing_of(target.scheme), target.scheme.weights.num_bits
        stored = self.scale_dtype(target.dtype)
        for part in split(target, layer, prefix):
            if not isinstance(part, Part):
                yield part
                continue
            # Powers of two are stored as exponents.
            scale = part.scale if isinstance(target.scheme.weights, Mxfp4Grid) else part.scale.to(stored)
            assert torch.equal(scale.float(), part.scale), f"{part.name}: scales are not those of {stored}"
            stem = part.name.removesuffix(WEIGHT)
            for suffix, tensor in packing.pack(part.codes, scale, num_bits).items():
                yield stem + suffix, tensor

    def quantization_config(self, target: Target) -> dict[str, Any]:
        """As ``compressed_tensors.quantization.QuantizationConfig`` writes it."""
        return {
            "quant_method": COMPRESSED_TENSORS,
            "quantization_status": "compressed",
            "format": packing_of(target.scheme).format,
            "config_groups": {"group_0": _group(target.scheme)},
            "ignore": ["lm_head", *_gates(target)],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def finish(self, folder: Path, out: Path, check: Callable[[Path], None] | None = None) -> None:
        """See `Container`."""
        take_name(folder, out, check)

    def read_scheme(self, folder: ModelFolder) -> Scheme:
        """See `Container`."""
        config: Any = folder.config.quantization_config
        groups = list(config["config_groups"].values())
        group_size = groups[0]["weights"].get("group_size")
        for scheme in SCHEMES.values():
            if self.name in scheme.containers and len(groups) == 1:
                found = replace(scheme, weights=replace(scheme.weights, group_size=group_size))
                if _says(groups[0], _group(found)) and config["format"] == packing_of(found).format:
                    return found
        raise ValueError(f"{folder.path} is quantised to {groups}, which is none of {offered(self.name)}")

    def read_layer(self, folder: ModelFolder, layer: int) -> RoundedLayer:
        """See `Container`."""
        codes, scales = self.views(folder)
        return join(codes, scales, layer=layer, grid=self.read_scheme(folder).weights)

    def views(self, folder: ModelFolder) -> tuple[PartFolder, PartFolder]:
        """The folder with codes in the place of its quantised weights, and with scales in fp32."""
        scheme = self.read_scheme(folder)
        packing, num_bits = packing_of(scheme), scheme.weights.num_bits
        matrices = [name.removesuffix(_SCALE) + WEIGHT for name in folder.names if name.endswith(_SCALE)]

        def read_codes(name: str) -> Tensor:
            stem = name.removesuffix(WEIGHT)
            return packing.codes(lambda suffix: folder.read(stem + suffix), num_bits)

        def read_scale(name: str) -> Tensor:
            return packing.scale(folder.read(name.removesuffix(WEIGHT) + _SCALE))

        return PartFolder(folder, matrices, read_codes), PartFolder(folder, matrices, read_scale)


def _group(scheme: Scheme) -> dict[str, Any]:
    """``QuantizationScheme`` of the package."""
    is_grouped = scheme.weights.group_size is not None
    activations = scheme.activations
    return {
        "targets": ["Linear"],
        "weights": _arguments(scheme.weights, "group" if is_grouped else "channel", is_dynamic=False),
        "input_activations": None if activations is None else _arguments(activations, "token", is_dynamic=True),
        "output_activations": None,
        "format": packing_of(scheme).format,
    }


def _arguments(grid: Grid, strategy: str, is_dynamic: bool) -> dict[str, Any]:
    """``QuantizationArgs`` of a grid."""
    values = {
        "num_bits": grid.num_bits,
        "type": "int" if isinstance(grid, IntGrid) else "float",
        "symmetric": True,
        "group_size": grid.group_size,
        "strategy": strategy,
        "dynamic": is_dynamic,
    }
    return values | ({"scale_dtype": "torch.uint8"} if isinstance(grid, Mxfp4Grid) else {})


def _says(group: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a config group has all that we would write; the package writes more fields."""
    for part in ("weights", "input_activations"):
        wanted, found = expected[part], group.get(part)
        if wanted is None or found is None:
            if wanted is not found:
                return False
        elif any(found.get(field) != value for field, value in wanted.items()):
            return False
    return True


def _gates(target: Target) -> list[str]:
    """Modules that decide where tokens go, by their names in the checkpoint."""
    form, spec = FORMATS[target.to], target.config.spec
    assert isinstance(form, StockFormat)
    names = [name for name in ("gate", form.names.shared_gate) if name is not None]
    layers = [n for n in range(decoder_config(target.config).num_hidden_layers) if spec.is_moe_layer(n)]
    return [f"model.layers.{layer}.{form.names.block}.{name}" for layer in layers for name in names]
