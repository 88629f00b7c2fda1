"""Training checkpoints of whole models, made without ranks; the real writers' files and names."""

import json
from pathlib import Path

from torch import Tensor, nn

from moe.layer import moe_layers
from moe.parallel.checkpoint import STATE
from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.files import rank_file, write_bytes, write_manifest
from moe.parallel.checkpoint.tensor_file import write_tensors


def write_checkpoint(path: Path, model: nn.Module, ep_size: int, attachments: dict[str, bytes] | None = None) -> Path:
    """What ``ep_size`` ranks would have saved before their first step; parameters go to them in turn."""
    path.mkdir(parents=True)
    experts = {
        f"{layer_name}.experts.{name}"
        for layer_name, layer in moe_layers(model).items()
        for name, _ in layer.experts.named_parameters()
    }
    files: list[dict[str, Tensor]] = [{} for _ in range(ep_size)]
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name in experts:
            for rank, piece in enumerate(parameter.detach().chunk(ep_size)):
                files[rank][f"weight/{name}@{rank * len(piece)}"] = piece.contiguous()
        else:
            files[index % ep_size][f"weight/{name}"] = parameter.detach()
    persistent = model.state_dict()
    files[0] |= {f"buffer/{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
    records = {}
    for rank, tensors in enumerate(files):
        sums = {key: checksums(tensor, "@" in key) for key, tensor in tensors.items()}
        metadata = {"checksums": json.dumps(sums)}
        records[rank_file(path, rank).name] = write_tensors(rank_file(path, rank), tensors, metadata)
    config = model.config
    state = {
        "step": 0,
        "optimizer_steps": 0,
        "world_size": ep_size,
        "ep_size": ep_size,
        "zero_stage": 1,
        "model_config": {"model_type": config.model_type, **config.to_diff_dict()},
    }
    for name, content in {**(attachments or {}), STATE: json.dumps(state).encode()}.items():
        records[name] = write_bytes(path / name, content)
    write_manifest(path, records)
    return path
