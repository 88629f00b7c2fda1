"""Writes a converted model, layer by layer: the one place through which upcycling, carving, export and import all go."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moe.models.config import MoEConfig
from moe.models.folder import SHARD_BYTES, FolderWriter, ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.models.stock import FORMATS

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is written.

    Attributes:
        source: where tensors outside the MoE layers, tokenizer and generation config come from.
        config: the model that comes out.
        layer_weights: the MoE layer of a decoder layer; called once for each, from the bottom.
        replaced: whether a tensor of the source is the FFN of a layer that becomes an MoE, so that it is not copied.
        read: gives a copied tensor by its name; by default the source's own.
        texts: other files by name, such as a model card.
    """

    source: ModelFolder
    config: MoEConfig
    layer_weights: Callable[[int], MoEWeights]
    replaced: Callable[[int, str], bool]
    read: Callable[[str], Tensor] | None = None
    texts: dict[str, str] = field(default_factory=dict)


def check_fits(config: MoEConfig, to: str) -> None:
    """Raise a ValueError that names what the format ``to`` cannot express."""
    if to not in FORMATS:
        raise ValueError(f"--to {to!r} is unknown; use one of {', '.join(FORMATS)}")
    if problems := FORMATS[to].refusals(config):
        raise ValueError(f"the model does not fit {to}: " + "; ".join(problems))


def write_model(
    conversion: Conversion,
    out: Path,
    to: str,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the folder ``out`` in the format ``to``; memory is that of one layer.

    Args:
        conversion: what.
        out: the folder to make; it appears when it is complete.
        to: a key of `FORMATS`.
        progress: called with layers done and in all.
        shard_bytes: largest weights file, unless one tensor is larger.

    Raises:
        ValueError: ``out`` exists, the model does not fit the format, or the source is damaged.
    """
    check_fits(conversion.config, to)
    spec, source = conversion.config.spec, conversion.source
    read = conversion.read or source.read
    by_layer = _names_by_layer(source)
    num_layers = len(by_layer) - 1
    with FolderWriter(out, shard_bytes) as writer:
        for name in by_layer.pop(None):
            writer.add(name, read(name))
        for layer, names in sorted(by_layer.items()):
            assert layer is not None
            is_moe = spec.is_moe_layer(layer)
            for name in names:
                if not (is_moe and conversion.replaced(layer, name)):
                    writer.add(name, read(name))
            if is_moe:
                weights = conversion.layer_weights(layer)
                for name, tensor in FORMATS[to].write_layer(conversion.config, weights, f"model.layers.{layer}."):
                    writer.add(name, tensor)
                del weights
            if progress is not None:
                progress(layer + 1, num_layers)
        return writer.finish(FORMATS[to].to_stock(conversion.config), source.sidecars(), conversion.texts)


def _names_by_layer(source: ModelFolder) -> dict[int | None, list[str]]:
    """Names of each decoder layer, and under ``None`` of everything else."""
    found: dict[int | None, list[str]] = {None: []}
    for name in source.names:
        match = _LAYER.match(name)
        found.setdefault(int(match[1]) if match else None, []).append(name)
    return found
