"""Opens a quantised folder as a model that computes with packed weights.

Layers are read, packed and laid out for their device one after the other, so the model is never there in full precision.
"""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from moe.models import MoEForCausalLM
from moe.models.folder import ModelFolder
from moe.quant.containers import container_of
from moe.quant.layer import banks
from moe.quant.load import our_config
from moe.quant.rounded import RoundedLayer
from moe.quant.runtime.linear import QuantizedLinear
from moe.quant.runtime.pack import is_packable, pack
from moe.quantized_experts import QuantizedExpertBank
from moe.quantized_module import QuantizedModule

_LAYERS = "model.layers."
_FP32 = MoEForCausalLM._keep_in_fp32_modules_strict


@torch.no_grad()
def load_quantized(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> MoEForCausalLM:
    """The model of a folder with quantised weights, in eval mode, with its matrices packed.

    Args:
        folder: that `moe quantize` wrote with a weight-only scheme, or another program in the same format.
        device: where it will run.
        dtype: of activations, and of all weights that are not quantised.

    Raises:
        ValueError: it is not quantised, in a way that we do not have or that rounds activations, or damaged.
    """
    source = ModelFolder(folder)
    container = container_of(source)
    if container is None:
        raise ValueError(f"{folder} is not quantised; load it with AutoModelForCausalLM")
    scheme = container.read_scheme(source)
    if not is_packable(scheme):
        raise ValueError(f"{folder} is quantised to {scheme.name}, which rounds activations; use load_simulated")
    config = our_config(source)
    with init_empty_weights():
        model = MoEForCausalLM(config)
    _forget_buffers(model)
    outside = {name: source.read(name) for name in source.names if not name.startswith(_LAYERS)}
    problems = _fill(model, outside, dtype)
    model.tie_weights()
    _refuse(folder, [*problems, *(f"{name} is missing" for name in _empty(model) if not name.startswith(_LAYERS))])
    layers, model.model.layers = model.model.layers, nn.ModuleList()  # empty as yet: they move one by one
    cast(Any, model).to(device)
    model.model.layers = layers
    for index, layer in enumerate(layers):
        problems = _fill_layer(layer, container.read_layer(source, index), dtype)
        _refuse(folder, [*problems, *(f"{name} of layer {index} is missing" for name in _empty(layer))])
        layer.to(device)
        for module in layer.modules():
            if isinstance(module, QuantizedModule):
                module.lay_out(device, dtype)
    return with_generation_config(model.eval(), folder)


def with_generation_config(model: MoEForCausalLM, folder: Path) -> MoEForCausalLM:
    """The model with the folder's settings of `generate`, if there are any."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fill_layer(layer: nn.Module, read: RoundedLayer, dtype: torch.dtype) -> list[str]:
    """Put packed modules in the place of a layer's, and its other weights into it; returns what is unknown."""
    weights = {name: pack(rounded) for name, rounded in read.rounded.items()}
    for name, bank in banks(layer).items():
        up, down = (weights.pop(f"{name}.{part}") for part in ("gate_up_proj", "down_proj"))
        layer.set_submodule(name, QuantizedExpertBank(up, down, bank.activation))
    for name, weight in weights.items():
        linear = layer.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear), name
        layer.set_submodule(name.removesuffix(".weight"), QuantizedLinear(weight, linear.bias))
    return _fill(layer, read.rest, dtype)


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Give a module its tensors, converted as `from_pretrained` converts them; returns what is unknown."""
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name.rpartition(".")[2] not in _FP32 else tensor
        for name, tensor in tensors.items()
    }
    unexpected = module.load_state_dict(state, strict=False, assign=True).unexpected_keys
    return [f"{name} is unknown" for name in unexpected]


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder} does not fit its config: {'; '.join(problems[:3])}")


def _empty(module: nn.Module) -> list[str]:
    """Parameters and buffers that nothing was put into."""
    return [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]


def _forget_buffers(model: nn.Module) -> None:
    """Make those that a folder stores (selection biases) as empty as parameters are, so that a missing one is seen."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to("meta"))
