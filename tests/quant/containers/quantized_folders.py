"""Tiny models, rounded to nearest and stored in a container, without the rest of the command."""

from pathlib import Path
from typing import Any

import torch
from models.stock.stock_cases import make_stock
from torch import nn

from moe.models import MoEForCausalLM
from moe.models.compare import load_folder
from moe.models.folder import FolderWriter, ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model
from moe.quant.containers import CONTAINERS, Target
from moe.quant.grids import Rounded, Scales
from moe.quant.layer import banks, linears
from moe.quant.rounded import RoundedLayer
from moe.quant.schemes import SCHEMES, Scheme
from moe.quant.simulate import quantize_activations

# Widths that groups of 32 divide; the rest of a model is as in `stock_cases`.
WIDE = {
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 32},
    "glm4_moe": {"intermediate_size": 96, "moe_intermediate_size": 32},
    "olmoe": {"intermediate_size": 32},
    "dots1": {"intermediate_size": 96, "moe_intermediate_size": 32},
    "deepseek_v3": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "v_head_dim": 16,
    },
}


def scheme_of(name: str, group_size: int | None = None) -> Scheme:
    return SCHEMES[name] if group_size is None else SCHEMES[name].with_group_size(group_size)


def source_folder(kind: str, path: Path, **values: Any) -> ModelFolder:
    """A stock model whose widths groups divide, with 128 hidden columns."""
    heads = {} if kind == "deepseek_v3" else {"head_dim": 32}
    if kind in ("qwen2_moe", "olmoe"):
        heads = {}
    make_stock(kind, path, **({"hidden_size": 128, "initializer_range": 0.1} | WIDE[kind] | heads | values))
    return ModelFolder(path)


def target_of(source: ModelFolder, scheme: Scheme, to: str, dtype: torch.dtype = torch.float32) -> Target:
    """What a quantisation of ``source`` would write."""
    return Target(config=reformat(source).config, scheme=scheme, to=to, dtype=dtype)


def our_model(source: ModelFolder, path: Path) -> MoEForCausalLM:
    """The same model as ours, in fp32."""
    write_model(reformat(source), path, "moe")
    return load_folder(path, torch.float32)


def rounded_layer(layer: nn.Module, scheme: Scheme, stored: torch.dtype, dtype: torch.dtype) -> RoundedLayer:
    """All matrices of a layer of ours, rounded to nearest; the rest in ``dtype``."""
    rounded = {
        f"{name}.weight": scheme.weights.nearest(linear.weight.detach(), stored)
        for name, linear in linears(layer).items()
    }
    for name, bank in banks(layer).items():
        for part in ("gate_up_proj", "down_proj"):
            stack = [scheme.weights.nearest(weight.detach(), stored) for weight in getattr(bank, part)]
            zeros = [one.scales.zero for one in stack]
            rounded[f"{name}.{part}"] = Rounded(
                codes=torch.stack([one.codes for one in stack]),
                scales=Scales(
                    scale=torch.stack([one.scales.scale for one in stack]),
                    zero=None if zeros[0] is None else torch.stack(zeros),
                ),
                grid=scheme.weights,
            )
    rest = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items() if name not in rounded}
    return RoundedLayer(rounded=rounded, rest=rest)


def write_quantized(
    source: ModelFolder, scratch: Path, out: Path, scheme: Scheme, container: str, dtype: torch.dtype = torch.float32
) -> MoEForCausalLM:
    """Write the folder, and give the simulated model: weights as they are read again, activations rounded."""
    model = our_model(source, scratch / f"{out.name}-ours")
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.to(dtype))
    held = CONTAINERS[container]
    to = source.config.model_type if source.config.model_type in held.targets else "moe"
    target = target_of(source, scheme, to, dtype)
    held.check(target)
    inside = "model.layers."
    layers = [rounded_layer(layer, scheme, held.scale_dtype(dtype), dtype) for layer in model.model.layers]
    with FolderWriter(out) as writer:
        for name, tensor in model.state_dict().items():
            if not name.startswith(inside) and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                writer.add(name, tensor.to(dtype))
        for index, layer in enumerate(layers):
            for name, tensor in held.write_layer(target, layer, f"{inside}{index}."):
                writer.add(name, tensor)
        config = FORMATS[to].to_stock(model.config)
        config.dtype = dtype
        config.quantization_config = held.quantization_config(target)
        writer.finish(config, [])
    for module, layer in zip(model.model.layers, layers, strict=True):
        module.load_state_dict({name: one.dequantize() for name, one in layer.rounded.items()} | layer.rest)
        quantize_activations(module, scheme.activations)
    return model
