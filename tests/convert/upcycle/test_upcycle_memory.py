"""Memory is that of one layer, however many there are; measured in a process of its own on checkpoints that are holes in files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 1 << 20


def write_hollow(folder: Path, layers_per_shard: int, **config: Any) -> None:
    """A bf16 Llama whose tensors are all zeros and take no disk: a safetensors header, and a file made longer."""
    folder.mkdir()
    text_config = LlamaConfig(**config, dtype="bfloat16")
    text_config.architectures = ["LlamaForCausalLM"]
    text_config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(text_config).state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        shards.setdefault(f"model-{layer // layers_per_shard}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        entries, offset = {}, 0
        for name, tensor in tensors.items():
            end = offset + 2 * tensor.numel()
            entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + offset)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measured(source: Path, out: Path, **options: Any) -> dict[str, int]:
    worker = Path(__file__).with_name("memory_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(worker), str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / MIB:.0f} MiB" for name, value in found.items()})
    return found


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """12 layers of 9 MiB become 12 of 36: the whole is 430 MiB, a layer's source and result 45 and the embedding 16."""
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 4, "vocab_size": 16384}
    write_hollow(tmp_path / "dense", 12, num_hidden_layers=12, **sizes)
    found = measured(tmp_path / "dense", tmp_path / "moe", num_experts=4, method="drop")
    layer = 3 * 2 * sizes["hidden_size"] * sizes["intermediate_size"]
    whole = sum(file.stat().st_size for file in (tmp_path / "moe").iterdir())
    assert whole > 12 * 4 * layer
    assert found["anonymous"] < 5 * layer + 64 * MIB
    assert found["peak"] - found["before"] < 5 * layer + 128 * MIB < whole / 2


@pytest.mark.slow  # writes 6 GiB
def test_layers_of_seven_billion_parameters(tmp_path: Path) -> None:
    """Four of Llama-2 7B's layers, two of them with 8 experts: the largest layer's source and result and 1 GiB, all told."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    write_hollow(tmp_path / "dense", 2, num_hidden_layers=4, **sizes)
    found = measured(tmp_path / "dense", tmp_path / "moe", num_experts=8, method="drop", layers="0-1")
    layer = 3 * 2 * sizes["hidden_size"] * sizes["intermediate_size"]
    for file in (tmp_path / "moe").iterdir():
        file.unlink()
    assert found["peak"] < 9 * layer + 1024 * MIB
