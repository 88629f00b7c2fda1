"""Writes a converted model, layer by layer: the one place through which upcycling, carving, export and import all go."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe.models.config import MoEConfig
from moe.models.folder import SHARD_BYTES, FolderWriter, ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.models.stock import FORMATS
from moe.models.stock.decoder import decoder_config
from moe.routers import ROUTERS

# Buffers whose small steps would vanish in half precision, by our names and by the stock ones.
_FP32 = (*sorted({name for router in ROUTERS.values() for name in router.fp32_buffers}), "e_score_correction_bias")
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
    dtype: torch.dtype | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write the folder ``out`` in the format ``to``; memory is that of one layer.

    Args:
        conversion: what.
        out: the folder to make; it appears when it is complete.
        to: a key of `FORMATS`.
        progress: called with layers done and in all.
        shard_bytes: largest weights file, unless one tensor is larger.
        dtype: of the weights; by default as they come. Selection biases stay fp32.
        check: called with the complete folder before it gets its name; what it raises makes the folder vanish.

    Raises:
        ValueError: ``out`` exists, the model does not fit the format, or the source is damaged.
    """
    check_fits(conversion.config, to)
    spec, source = conversion.config.spec, conversion.source
    num_layers = decoder_config(conversion.config).num_hidden_layers
    by_layer = _names_by_layer(source)
    with FolderWriter(out, shard_bytes) as writer:
        sink = _Sink(writer, dtype)
        read = conversion.read or source.read
        for name in by_layer.pop(None):
            sink.add(name, read(name))
        # Multi-token prediction layers, which released checkpoints have above the last one, stay behind.
        for layer in range(num_layers):
            is_moe, prefix = spec.is_moe_layer(layer), f"model.layers.{layer}."
            for name in by_layer.get(layer, []):
                if not (is_moe and conversion.replaced(layer, name)):
                    sink.add(name, read(name))
            sink.add_all(FORMATS[to].added(conversion.config, sink.main_dtype, prefix))
            if is_moe:
                weights = conversion.layer_weights(layer)
                sink.add_all(FORMATS[to].write_layer(conversion.config, weights, prefix))
                del weights
            if progress is not None:
                progress(layer + 1, num_layers)
        config = FORMATS[to].to_stock(conversion.config)
        for part in (config, config.get_text_config()):
            part.dtype = sink.main_dtype
        return writer.finish(config, source.sidecars(), conversion.texts, check)


class _Sink:
    """Converts tensors on their way to the writer."""

    def __init__(self, writer: FolderWriter, dtype: torch.dtype | None) -> None:
        self._writer, self._dtype = writer, dtype
        self._first: torch.dtype | None = None

    @property
    def main_dtype(self) -> torch.dtype:
        """Of the first tensor, an embedding: what the config says."""
        assert self._first is not None, "a model has embeddings"
        return self._first

    def add(self, name: str, tensor: Tensor) -> None:
        """Convert and append."""
        if self._dtype is not None and tensor.is_floating_point() and not name.endswith(_FP32):
            tensor = tensor.to(self._dtype)
        self._first = self._first or tensor.dtype
        self._writer.add(name, tensor)

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Convert and append several."""
        for name, tensor in tensors:
            self.add(name, tensor)


def _names_by_layer(source: ModelFolder) -> dict[int | None, list[str]]:
    """Names of each decoder layer, and under ``None`` of everything else."""
    found: dict[int | None, list[str]] = {None: []}
    for name in source.names:
        match = _LAYER.match(name)
        found.setdefault(int(match[1]) if match else None, []).append(name)
    return found
