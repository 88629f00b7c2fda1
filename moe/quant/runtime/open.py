"""Opens any quantised folder of ours: packed where kernels multiply by its codes, else simulated."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from moe.models import MoEForCausalLM
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.quant.containers import Container, container_of
from moe.quant.load import load_simulated
from moe.quant.runtime.load import load_quantized, with_generation_config
from moe.quant.runtime.pack import is_packable


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model, and how it runs.

    Attributes:
        model: in eval mode.
        note: one line for people.
    """

    model: MoEForCausalLM
    note: str


def open_quantized(model: str, device: str, dtype: torch.dtype | None = None) -> Opened | None:
    """The model of a folder that is quantised in a way of ours; ``None`` for any other, which transformers may know.

    Args:
        model: folder, or hub name.
        device: where it will run.
        dtype: of activations; by default bf16 for packed weights, and fp32 where simulated.

    Raises:
        ValueError: the folder is damaged, or cannot run in ``dtype``.
    """
    folder = Path(model)
    container = _container(folder)
    if container is None:
        return None
    scheme = container.read_scheme(ModelFolder(folder))
    if is_packable(scheme):
        dtype = dtype or torch.bfloat16
        loaded, how = load_quantized(folder, device, dtype), "packed weights"
    else:
        if dtype not in (None, torch.float32):
            raise ValueError(f"{folder} is quantised to {scheme.name}, which is simulated in fp32; leave --dtype out")
        dtype = torch.float32
        loaded = with_generation_config(load_simulated(folder), folder)
        cast(Any, loaded).to(device)
        how = "simulated, with the memory and the time of a model in full precision"
    return Opened(model=loaded, note=f"{folder} is quantised to {scheme.name}: {how}, activations in {dtype}")


def _container(folder: Path) -> Container | None:
    """What a folder is stored as, if we can read it."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" not in config or config.get("model_type") not in (
        *FORMATS,
        MoEForCausalLM.config_class.model_type,
    ):
        return None
    try:
        return container_of(ModelFolder(folder))
    except ValueError:
        return None
