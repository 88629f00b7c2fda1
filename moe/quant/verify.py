"""Whether a quantised folder holds a model that can be served: sound tensors, and logits that servers compute from them.

A list of missing keys is not enough: loaders drop, rename and misread tensors without a word. So the folder runs in stock
transformers, in a process of its own that knows nothing of us, and its logits are compared with those of our simulated model.
Both sides have dequantised weights in the dtype of the checkpoint, compute in fp32 and leave activations as they are.
transformers 5 does not load experts of format int-quantized; those are decompressed by the package compressed-tensors, tensor
by tensor, and then run in the same way.

Legend: B windows, L window length.
"""

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import moe_layers
from moe.models import MoEForCausalLM
from moe.models.compare import LogitComparison, LogitsFile, compare_logits, model_logits
from moe.models.folder import FolderWriter, ModelFolder
from moe.models.stock.decoder import decoder_config
from moe.models.verify import check, run_apart
from moe.quant.containers import container_of
from moe.quant.containers.parts import WEIGHT, plain_config
from moe.quant.load import load_simulated, our_config
from moe.quant.rounded import RoundedLayer
from moe.quant.schemes import COMPRESSED_TENSORS
from moe.types import Routing

FAR = 1e-2  # relative to the RMS of the logits
_UNSTACKED_BY_PACKAGE = "int-quantized"


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """What `verify_folder` found.

    Attributes:
        num_tensors: that were scanned.
        loaded_by: who computed the logits that ours were compared with; ``None`` where nobody else can.
        logits: the comparison.
    """

    num_tensors: int
    loaded_by: str | None = None
    logits: LogitComparison | None = None


def verify_folder(folder: Path, windows_BL: Tensor) -> FolderCheck:
    """Scan a folder, and compare it with what stock software makes of it.

    Args:
        folder: quantised, in any container.
        windows_BL: token ids.

    Raises:
        ValueError: the folder is not sound, does not load, or computes something else; says what.
    """
    source = ModelFolder(folder)
    config: Any = source.config
    if problems := scan(source):
        raise ValueError(f"{folder} is damaged: " + "; ".join(problems[:8]))
    num_tensors = len(source.names)
    quantization: dict[str, Any] = config.quantization_config
    if quantization["quant_method"] != COMPRESSED_TENSORS:
        return FolderCheck(num_tensors=num_tensors)
    load_compressed_tensors()
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = (LogitsFile(Path(scratch) / name, len(windows_BL)) for name in ("ours", "theirs"))
        dtype = config.dtype
        ours.write(model_logits(load_simulated(folder, round_activations=False, dtype=dtype), windows_BL))
        loaded_by, runnable = "transformers", folder
        if quantization["format"] == _UNSTACKED_BY_PACKAGE:
            loaded_by, runnable = "compressed-tensors and transformers", Path(scratch) / "decompressed"
            decompress(source, runnable)
        run_apart(runnable, windows_BL, dtype, theirs.path)
        length = windows_BL.shape[1]
        found = compare_logits(ours.windows(length), theirs.windows(length), windows_BL, FAR)
    check(found, FAR)
    return FolderCheck(num_tensors=num_tensors, loaded_by=loaded_by, logits=found)


def load_compressed_tensors() -> ModuleType:
    """The package ``compressed_tensors``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("compressed_tensors")
    except ImportError:
        raise ValueError(
            "checking a quantised folder needs the package compressed-tensors: pip install 'moe-framework[quant]', or pass "
            "--no-verify"
        ) from None


def decompress(source: ModelFolder, out: Path) -> None:
    """Write the model with the weights that the package's own code makes of a quantised folder, in the checkpoint's dtype."""
    load_compressed_tensors()
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = source.config
    values: dict[str, Any] = config.quantization_config
    scheme = next(iter(QuantizationConfig.model_validate(values).config_groups.values()))
    compressor = BaseCompressor.get_value_from_registry(values["format"])
    with FolderWriter(out) as writer:
        matrices: dict[str, dict[str, Tensor]] = {}
        for name in source.names:
            stem, _, suffix = name.rpartition(".")
            if f"{stem}.weight_scale" not in source or not suffix.startswith("weight"):
                writer.add(name, source.read(name))
            elif stem not in matrices:
                parts = {other for other in source.names if other.startswith(f"{stem}.weight")}
                state = {part.removeprefix(f"{stem}."): source.read(part) for part in parts}
                matrices[stem] = {}
                writer.add(stem + WEIGHT, compressor.decompress(state, scheme)["weight"].to(config.dtype))
        writer.finish(plain_config(source), source.sidecars())


def scan(source: ModelFolder) -> list[str]:
    """What is wrong with the tensors of a quantised folder, one sentence each.

    Every parameter has to be there in its shape, those of every expert among them; all values are finite, scales positive too.
    """
    container, config = container_of(source), our_config(source)
    assert container is not None, "a folder that is not quantised"
    problems = [f"{name} has values that are not finite" for name in source.names if not _is_finite(source.read(name))]
    with torch.device("meta"):
        model: Any = MoEForCausalLM(config)
    for name in model.state_dict():
        is_tied = name == "lm_head.weight" and config.tie_word_embeddings
        if not name.startswith("model.layers.") and name not in source and not is_tied:
            problems.append(f"{name} is missing")
    for index in range(decoder_config(config).num_hidden_layers):
        try:
            layer = container.read_layer(source, index)
        except (ValueError, RuntimeError) as problem:  # the latter from stacking what has several shapes
            problems.append(f"layer {index} cannot be read: {problem}")
            continue
        problems += [f"model.layers.{index}.{found}" for found in _problems(layer, model.model.layers[index])]
    return problems


def _problems(layer: RoundedLayer, expected: nn.Module) -> Iterator[str]:
    """What a layer lacks, has in another shape, or has wrong."""
    state = expected.state_dict()
    for name, tensor in state.items():
        found = layer.rounded[name].codes if name in layer.rounded else layer.rest.get(name)
        if found is None:
            yield f"{name} is missing"
        elif found.shape != tensor.shape:
            yield f"{name} has shape {tuple(found.shape)} instead of {tuple(tensor.shape)}"
    for name, rounded in layer.rounded.items():
        scale = rounded.scales.scale
        if not (scale.isfinite() & (scale > 0)).all():
            yield f"{name} has scales that are not positive and finite"
        elif not rounded.dequantize().isfinite().all():
            yield f"{name} has codes that stand for no number"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


@torch.no_grad()
def chosen_experts(model: nn.Module, windows_BL: Tensor) -> dict[str, Tensor]:
    """(T, E) bool for each MoE layer by name: which experts its router chooses for each token of a text.

    Args:
        model: ours.
        windows_BL: token ids, T = B * L.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in moe_layers(model)}
    hooks = []
    for name, layer in moe_layers(model).items():

        def note(_: nn.Module, args: Any, routing: Routing, into: list[Tensor] = found[name]) -> None:
            chosen_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
            chosen_TE[routing.token_ids_N, routing.expert_ids_N] = True
            into.append(chosen_TE)

        hooks.append(layer.router.register_forward_hook(note))
    try:
        for ids_L in windows_BL:
            model(input_ids=ids_L[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def router_agreement(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Of the experts that the reference's routers choose, share that the other's choose for the same tokens, by layer.

    Args:
        reference, other: of `chosen_experts`, on the same text.
    """
    return {
        name: float((chosen_TE & other[name]).sum() / chosen_TE.sum().clamp_min(1))
        for name, chosen_TE in reference.items()
    }
