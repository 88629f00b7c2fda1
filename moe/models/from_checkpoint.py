"""From a training checkpoint to a Hugging Face folder: tensor by tensor, on CPU, without a process group.

A checkpoint names parameters as the model does and holds them whole or as slices of experts, so nothing has to be built:
each tensor is read, compared with its checksums, converted and appended to a shard. Memory is that of one tensor.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moe.parallel.checkpoint import CheckpointError, CheckpointReader, attachments, load_weights, read_state
from moe.parallel.checkpoint.tensor_file import TensorFile, TensorSpec

SHARD_BYTES = 5 * 10**9


def export_checkpoint(
    checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES, replace: bool = False
) -> None:
    """Write weights, config, generation config and tokenizer; the folder appears when it is complete.

    Args:
        checkpoint: a checkpoint's folder, of any layout.
        out: the folder to make.
        dtype: of the weights; buffers that routers keep in fp32 stay so.
        shard_bytes: largest weights file, unless one tensor is larger.
        replace: put the new folder in the place of an existing one.

    Raises:
        CheckpointError: the checkpoint is damaged, or not of the model that its state describes.
        ValueError: ``out`` exists.
    """
    if out.exists() and not replace:
        raise ValueError(f"{out} exists; remove it or choose another folder")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _write(checkpoint, partial, dtype, shard_bytes)
        old = out.with_name(f"{partial.name}.old")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(checkpoint), dtype=torch.float32).to(dtype)
    model.config.use_cache = True
    for file in attachments(checkpoint):
        shutil.copyfile(file, out / file.name)
    if get_model_conversion_mapping(model, add_legacy=False):
        # A stock architecture whose files have other tensors than its modules: transformers converts whole models only.
        _write_in_memory(checkpoint, out, dtype)
        return
    model.config.architectures, model.config.dtype = [type(model).__name__], str(dtype).removeprefix("torch.")
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    reader = CheckpointReader(checkpoint)
    _write_shards(reader, _sources(reader, model), out, shard_bytes)


def _config(checkpoint: Path) -> Any:
    return AutoConfig.for_model(**read_state(checkpoint)["model_config"])


def _write_in_memory(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(_config(checkpoint), dtype=torch.float32)
    load_weights(checkpoint, model)
    model.config.use_cache = True
    model.to(dtype).save_pretrained(out)


def _sources(reader: CheckpointReader, model: PreTrainedModel) -> dict[str, tuple[str, TensorSpec]]:
    """Of each tensor of the folder to be: its kind in the checkpoint, and what it becomes."""
    state = model.state_dict()
    kinds = {name: kind for kind in ("weight", "buffer") for name in reader.names(kind)}
    missing = state.keys() - kinds.keys() - set(getattr(model, "all_tied_weights_keys", {}))
    unexpected = kinds.keys() - state.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{reader.path} does not fit its model: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        )
    specs = {}
    for name in state:
        if name in kinds:
            if reader.shape(kinds[name], name) != list(state[name].shape):
                raise CheckpointError(f"{reader.path}: {name} has the shape {reader.shape(kinds[name], name)}")
            specs[name] = (kinds[name], TensorSpec(dtype=state[name].dtype, shape=tuple(state[name].shape)))
    return specs


def _write_shards(
    reader: CheckpointReader, sources: dict[str, tuple[str, TensorSpec]], out: Path, shard_bytes: int
) -> None:
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, (_, spec) in sources.items():
        if shards[-1] and filled + spec.num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.num_bytes
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    )
    for file, specs in zip(files, shards, strict=True):
        with TensorFile(out / file, specs, {"format": "pt"}) as shard:
            for name in shard.names:
                shard.write(name, reader.checked_tensor(sources[name][0], name).to(specs[name].dtype))
            shard.finish()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for _, spec in sources.values())},
            "weight_map": {name: file for file, specs in zip(files, shards, strict=True) for name in specs},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
