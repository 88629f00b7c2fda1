"""Containers: how a quantised model is stored. Adding one: a `Container` in a file of its own and a line in `CONTAINERS`."""

from typing import Any

from moe.models.folder import ModelFolder
from moe.quant.containers.compressed_tensors import CompressedTensors
from moe.quant.containers.container import Container, Target
from moe.quant.containers.gguf import Gguf
from moe.quant.containers.simulated import METHOD, Simulated
from moe.quant.schemes import COMPRESSED_TENSORS, GGUF, SIMULATED

CONTAINERS: dict[str, Container] = {
    COMPRESSED_TENSORS: CompressedTensors(),
    SIMULATED: Simulated(),
    GGUF: Gguf(),
}
# By ``quant_method`` of a folder's config; GGUF is a file.
_OF_FOLDERS = {COMPRESSED_TENSORS: CONTAINERS[COMPRESSED_TENSORS], METHOD: CONTAINERS[SIMULATED]}


def container_of(folder: ModelFolder) -> Container | None:
    """What a folder is stored as; ``None`` where it is not quantised.

    Raises:
        ValueError: it is quantised in another way.
    """
    config: dict[str, Any] | None = getattr(folder.config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method")
    if method not in _OF_FOLDERS:
        raise ValueError(
            f"{folder.path} is quantised by {method!r}; only {', '.join(_OF_FOLDERS)} are read: start from the model in bf16"
        )
    return _OF_FOLDERS[method]


__all__ = ["CONTAINERS", "Container", "Target", "container_of"]
