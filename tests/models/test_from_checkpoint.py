"""`moe checkpoint export`: the Hugging Face folder of a checkpoint is the model that was trained, for any layout."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from models.tiny import DIM, make_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from typer.testing import CliRunner

from moe.cli import app
from moe.models import from_checkpoint
from moe.models.from_checkpoint import export_checkpoint
from moe.parallel.checkpoint import CheckpointError
from moe.parallel.checkpoint.tensor_file import write_tensors

NOAUX = {"router": {"name": "noaux_tc"}, "balance": {"bias_update_rate": 1e-3}, "num_shared_experts": 1}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


def trained(**options: object) -> nn.Module:
    model = make_model(**(NOAUX | options)).eval()  # type: ignore[arg-type]
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.copy_(torch.randn(len(buffer)) * 0.01)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_logits_are_those_of_the_trained_model(ep_size: int, tied: bool, tmp_path: Path) -> None:
    model = trained(decoder={"tie_word_embeddings": tied})
    checkpoint = write_checkpoint(tmp_path / "step", model, ep_size, TOKENIZER)
    export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values()), info
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_folder_is_the_one_that_transformers_would_write(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", trained(), 2)
    from_checkpoint._write_in_memory(checkpoint, tmp_path / "expected", torch.float32)
    export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    for name in ("config.json", "generation_config.json"):
        expected, found = (json.loads((tmp_path / folder / name).read_text()) for folder in ("expected", "out"))
        assert found == expected, name
    expected, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_each_tensor_once(tmp_path: Path) -> None:
    model = trained()
    export_checkpoint(write_checkpoint(tmp_path / "step", model, 2), tmp_path / "out", torch.float32, shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    found = {}
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 4000 or len(sizes) == 1
        found |= dict.fromkeys(sizes, path.name)
    assert found == index["weight_map"] and found.keys() == model.state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_bf16_is_the_model_converted(tmp_path: Path) -> None:
    model = trained()
    export_checkpoint(write_checkpoint(tmp_path / "step", model, 2), tmp_path / "out", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    biases = [buffer for name, buffer in loaded.named_buffers() if name.endswith("bias_E")]
    assert biases and all(buffer.dtype == torch.float32 for buffer in biases), "their steps would vanish in bf16"
    expected = model.to(torch.bfloat16)
    assert torch.equal(loaded(tokens(2, 9)).logits, expected(tokens(2, 9)).logits)


def test_stock_architectures_get_their_own_tensor_names(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=48, hidden_size=DIM, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()), dtype=torch.float32).eval()
    export_checkpoint(write_checkpoint(tmp_path / "step", model, 1), tmp_path / "out", torch.float32)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in file.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_damage_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = trained()
    checkpoint = write_checkpoint(tmp_path / "step", model, 2)
    file = checkpoint / "rank-0001.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    key = next(key for key in tensors if "experts.down_proj" in key)
    tensors[key][[0, 1]] = tensors[key][[1, 0]]
    write_tensors(file, tensors, metadata)
    name = key.removeprefix("weight/").partition("@")[0]
    with pytest.raises(CheckpointError, match=rf"rank-0001.safetensors: weight of expert 2 of {name} is not what"):
        export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", trained(), 2)
    state = json.loads((checkpoint / "state.json").read_text())
    state["model_config"]["moe"]["num_shared_experts"] = 0
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"does not fit its model.*shared_experts"):
        export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", trained(), 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ValueError, match="exists; remove it or choose another"):
        export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    export_checkpoint(checkpoint, tmp_path / "out", torch.float32, replace=True)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step"]


# ---- the commands


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_commands_on_a_run(tmp_path: Path) -> None:
    model, root = trained(), tmp_path / "run" / "checkpoints"
    for step in (5, 10):
        write_checkpoint(root / f"step-{step:08d}", model, 2)
    status, out, _ = invoke("list", tmp_path / "run", "--json")
    rows = json.loads(out)
    assert status == 0 and [Path(row["path"]).name for row in rows] == ["step-00000005", "step-00000010"]
    assert rows[0]["ep_size"] == 2 and rows[0]["bytes"] > 10_000
    assert invoke("verify", root / "step-00000005")[0] == 0
    status, out, _ = invoke("verify", tmp_path / "run", "--json")
    assert status == 0 and json.loads(out)["checkpoint"].endswith("step-00000010")

    with (root / "step-00000010" / "rank-0000.safetensors").open("r+b") as file:
        file.truncate(2000)
    status, _, err = invoke("verify", root / "step-00000010")
    assert status == 2 and "is truncated" in err
    status, out, err = invoke("export", tmp_path / "run", tmp_path / "model", "--dtype", "bf16", "--json")
    assert status == 0 and "is truncated" in err, "the newest valid one is taken, and the other named"
    assert json.loads(out)["checkpoint"].endswith("step-00000005")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_commands_name_what_is_wrong(tmp_path: Path) -> None:
    status, _, err = invoke("verify", tmp_path)
    assert status == 2 and "is no checkpoint and no run with a valid one" in err
    status, _, err = invoke("export", tmp_path, tmp_path / "out", "--dtype", "fp8")
    assert status == 2 and "use fp32 or bf16" in err
    status, _, err = invoke("list", tmp_path)
    assert status == 2 and "give the folder of a run" in err


FRESH = """
import sys, torch, moe.models
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits.detach(), sys.argv[3])
assert not torch.distributed.is_initialized() and "deepspeed" not in sys.modules
"""


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = trained()
    write_checkpoint(tmp_path / "step", model, 4)
    command = [sys.executable, "-m", "moe.cli", "checkpoint", "export", str(tmp_path / "step"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    torch.save(tokens(2, 9), tmp_path / "in.pt")
    paths = [str(tmp_path / name) for name in ("out", "in.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *paths], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(tokens(2, 9)).logits)


class AnonymousMemory:
    """Largest growth of this process's memory that is not backed by a file, sampled."""

    def __enter__(self) -> "AnonymousMemory":
        self._before, self.growth, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.growth = max(self.growth, self._now() - self._before)
            time.sleep(0.002)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_few_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """The checkpoint is 30 times its largest tensor."""
    decoder = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "head_dim": 64}
    model = make_model(decoder=decoder, num_experts=16, expert_hidden=512)
    largest = max(parameter.nbytes for parameter in model.parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    checkpoint = write_checkpoint(tmp_path / "step", model, 4)
    del model
    assert total > 14 * largest
    with AnonymousMemory() as memory:
        export_checkpoint(checkpoint, tmp_path / "out", dtype, shard_bytes=2 * largest)
    assert memory.growth < 4 * largest, (memory.growth, largest, total)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5 - 3 * (dtype == torch.bfloat16)
