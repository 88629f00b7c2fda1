"""Quantised folders as ordinary models in fp32: what servers compute from them, apart from the order of sums."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.models import MoEForCausalLM
from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.decoder import decoder_config
from moe.quant.containers import container_of
from moe.quant.containers.parts import plain_config
from moe.quant.simulate import quantize_activations

_LAYERS = "model.layers."


def is_quantized(folder: Path) -> bool:
    """Whether a model folder is stored in a container of ours, and so is for `load_simulated`.

    Raises:
        ValueError: no model folder, or one quantised in another way.
    """
    return container_of(ModelFolder(folder)) is not None


def our_config(source: ModelFolder) -> MoEConfig:
    """The config of a quantised folder as ours."""
    stock = plain_config(source)
    return FORMATS["moe" if isinstance(stock, MoEConfig) else stock.model_type].from_stock(stock)


def load_simulated(folder: Path, round_activations: bool = True, dtype: torch.dtype = torch.float32) -> MoEForCausalLM:
    """The model of a quantised folder, on CPU in fp32 and eval mode: dequantised weights, and activations rounded per token.

    Args:
        folder: that `moe quantize` wrote, or another program in the same format.
        round_activations: False leaves them as they are, as servers do that dequantise all weights when they load.
        dtype: to which dequantised weights are rounded, as such servers do, before they become fp32 again.

    Raises:
        ValueError: it is not quantised, in a way that we do not have, or damaged.
    """
    source = ModelFolder(folder)
    container = container_of(source)
    if container is None:
        raise ValueError(f"{folder} is not quantised; load it with AutoModelForCausalLM")
    config = our_config(source)
    state: dict[str, Tensor] = {
        name: source.read(name).float() for name in source.names if not name.startswith(_LAYERS)
    }
    for index in range(decoder_config(config).num_hidden_layers):
        layer, prefix = container.read_layer(source, index), f"{_LAYERS}{index}."
        state |= {prefix + name: rounded.dequantize().to(dtype).float() for name, rounded in layer.rounded.items()}
        state |= {prefix + name: tensor.float() for name, tensor in layer.rest.items()}
    loaded: Any = MoEForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype="float32", output_loading_info=True
    )
    model, report = loaded
    if problems := {name: sorted(map(str, found)) for name, found in report.items() if found}:
        raise ValueError(f"{folder} does not fit its config: {problems}")
    for layer in model.model.layers:
        quantize_activations(layer, container.read_scheme(source).activations if round_activations else None)
    return model.eval()
