"""Codes and scales of a layer under a checkpoint format's names, and back.

All formats of `moe.models.stock.FORMATS` stack and split whole rows. So what they do to weights they do to codes, and to scales,
as well: each goes through `Format.write_layer` and `Format.read_layer` as if it were the weights.

Legend: P output rows, Q reduced columns, G groups of Q.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.models.stock import FORMATS
from moe.quant.containers.container import Target
from moe.quant.grids import Grid, Rounded, Scales
from moe.quant.rounded import RoundedLayer

WEIGHT = ".weight"
_FFN, _ROUTER, _SHARED_GATE = "mlp.", "mlp.router.", "mlp.shared_experts.gate.weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One quantised matrix of a folder.

    Attributes:
        name: of its weight, of which the folder has codes and scale instead.
        codes: (P, Q).
        scale: (P, G) fp32.
    """

    name: str
    codes: Tensor
    scale: Tensor


def split(target: Target, layer: RoundedLayer, prefix: str) -> Iterator[Part | tuple[str, Tensor]]:
    """The matrices of a layer one by one, and its other tensors with their names."""
    is_moe = f"{_FFN}experts.down_proj" in layer.rounded
    apart = _FFN if is_moe else "nothing"
    for name, tensor in layer.rest.items():
        if not name.startswith(apart):
            yield prefix + name, tensor
    for name, rounded in layer.rounded.items():
        if not name.startswith(apart):
            yield Part(name=prefix + name, codes=rounded.codes, scale=rounded.scales.scale)
    if not is_moe:
        return

    def written(pick: Callable[[Rounded], Tensor]) -> Iterator[tuple[str, Tensor]]:
        picked = {name: pick(rounded) for name, rounded in layer.rounded.items() if name.startswith(_FFN)}
        return FORMATS[target.to].write_layer(target.config, _moe_weights(picked, layer.rest), prefix)

    of_codes = layer.rounded[f"{_FFN}experts.down_proj"].codes.dtype
    for (name, codes), (_, scale) in zip(
        written(lambda rounded: rounded.codes), written(lambda rounded: rounded.scales.scale), strict=True
    ):
        # Routers and gates are floating.
        yield Part(name=name, codes=codes, scale=scale) if codes.dtype == of_codes else (name, codes)


def _moe_weights(matrices: dict[str, Tensor], rest: dict[str, Tensor]) -> MoEWeights:
    """One layer from tensors by the names of `MoEForCausalLM`."""
    return MoEWeights(
        router={name.removeprefix(_ROUTER): tensor for name, tensor in rest.items() if name.startswith(_ROUTER)},
        gate_up_EHD=matrices[f"{_FFN}experts.gate_up_proj"],
        down_EDF=matrices[f"{_FFN}experts.down_proj"],
        shared_gate_up_HD=matrices.get(f"{_FFN}shared_experts.gate_up_proj.weight"),
        shared_down_DF=matrices.get(f"{_FFN}shared_experts.down_proj.weight"),
        shared_gate_1D=rest.get(_SHARED_GATE),
    )


def plain_config(folder: ModelFolder) -> Any:
    """The folder's config as that of a model that is not quantised."""
    config = folder.config
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    return type(config).from_dict(values)


class PartFolder(ModelFolder):
    """A folder that shows the codes of its quantised matrices, or their scales, as if they were the weights.

    Args:
        folder: the real one.
        matrices: names of the weights that are quantised.
        read_part: gives codes or scale of one.
    """

    def __init__(self, folder: ModelFolder, matrices: Sequence[str], read_part: Callable[[str], Tensor]) -> None:
        self.path, self._files = folder.path, folder._files
        self.matrices = frozenset(matrices)
        others = (name for name in folder.names if not self._is_of_matrix(name))
        self._names = dict.fromkeys((*matrices, *others))
        self._read_part = read_part

    def _is_of_matrix(self, name: str) -> bool:
        """Whether a tensor is the packed codes, the scale or the shape of a matrix."""
        stem, _, suffix = name.rpartition(".")
        return suffix.startswith("weight_") and stem + WEIGHT in self.matrices

    @property
    def names(self) -> list[str]:
        """Names of all weights and other tensors."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what `read` gives."""
        return tuple(self.read(name).shape) if name in self.matrices else super().shape(name)

    def read(self, name: str) -> Tensor:
        """Codes or scale of a quantised weight; any other tensor as it is."""
        return self._read_part(name) if name in self.matrices else super().read(name)


def join(codes: PartFolder, scales: PartFolder, layer: int, grid: Grid) -> RoundedLayer:
    """The inverse of `split`, from two views of one folder."""
    stock, prefix = plain_config(codes), f"model.layers.{layer}."
    form = FORMATS["moe" if isinstance(stock, MoEConfig) else stock.model_type]
    is_moe = form.from_stock(stock).spec.is_moe_layer(layer)
    rest: dict[str, Tensor] = {}
    rounded: dict[str, Rounded] = {}

    def add(name: str, of_codes: Tensor, scale: Tensor) -> None:
        expected = (*of_codes.shape[:-1], of_codes.shape[-1] // (grid.group_size or of_codes.shape[-1]))
        if scale.shape != expected:
            raise ValueError(f"{codes.path}: scales of {prefix}{name} are {tuple(scale.shape)}, not {expected}")
        rounded[name] = Rounded(codes=of_codes, scales=Scales(scale=scale), grid=grid)

    for name in codes.names:
        short = name.removeprefix(prefix)
        if short == name or (is_moe and form.is_moe_tensor(name)):
            continue
        if name in codes.matrices:
            add(short, codes.read(name), scales.read(name))
        else:
            rest[short] = codes.read(name)
    if is_moe:
        found, found_scales = (dict(form.read_layer(stock, part, prefix).named(_FFN)) for part in (codes, scales))
        for name, tensor in found.items():
            if name.startswith(_ROUTER) or name == _SHARED_GATE:
                rest[name] = tensor
            else:
                add(name, tensor, found_scales[name])
    return RoundedLayer(rounded=rounded, rest=rest)
