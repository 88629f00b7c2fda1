"""Model folders: what is read is what was written, damage is named, and nothing unfinished has a model's name."""

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from models.tiny import decoder_config, make_model
from safetensors.torch import load_file, save_file

from moe.models.folder import INDEX, SINGLE, FolderWriter, ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.parallel.checkpoint.tensor_file import StreamedTensorFile


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(4, 3),
        "b.weight": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(6).view(2, 3),
        "d": torch.randn(5, 4).t(),
        "e": torch.tensor(2.5),
        "f": torch.empty(0, 3),
    }


def write(out: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> ModelFolder:
    with FolderWriter(out, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(decoder_config("llama"), [], {"README.md": "hello"})
    return ModelFolder(out)


@pytest.mark.parametrize("shard_bytes", [1, 60, 10**9])
def test_what_is_read_is_what_was_written(shard_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = write(tmp_path / "out", tensors, shard_bytes)
    assert folder.names == list(tensors)
    assert folder.config.model_type == "llama"
    assert (tmp_path / "out" / "README.md").read_text() == "hello"
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert torch.equal(folder.read(name), tensor) and folder.read(name).dtype == tensor.dtype
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert folder.num_bytes == sum(shard.stat().st_size for shard in shards)
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert together.keys() == tensors.keys()
    if shard_bytes == 10**9:
        assert [shard.name for shard in shards] == [SINGLE]
    else:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert len(shards) > 1 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


def test_shards_hold_as_much_as_they_may(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {str(i): torch.zeros(10) for i in range(7)}, shard_bytes=80)
    sizes = [len(load_file(tmp_path / "out" / f"model-{i:05d}-of-00004.safetensors")) for i in range(1, 5)]
    assert sizes == [2, 2, 2, 1] and len(folder.names) == 7


def test_a_full_header_begins_another_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedTensorFile, "HEADER_ROOM", 2048)
    tensors = {f"{i:0100d}": torch.tensor(float(i)) for i in range(10)}
    folder = write(tmp_path / "out", tensors)
    assert len(list((tmp_path / "out").glob("model-*"))) > 1
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; remove it or choose another"):
        FolderWriter(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on the way"), FolderWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(3))
        raise RuntimeError("on the way")
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_nothing_and_sees_everything(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert ModelFolder(folder).read("a").sum() == 3
        assert not (tmp_path / "out").exists()
        raise ValueError("not good")

    with pytest.raises(ValueError, match="not good"), FolderWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(3))
        writer.finish(decoder_config("llama"), [], check=check)
    assert not list(tmp_path.iterdir())


def write_for_ever(out: Path, progress: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were started in the background
    with FolderWriter(out, shard_bytes=1000) as writer:
        for number in range(10**9):
            writer.add(str(number), torch.zeros(100))
            if number == 20:
                progress.send(number)


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_no_model(killer: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    here, there = context.Pipe()
    process = context.Process(target=write_for_ever, args=(out, there))
    process.start()
    assert process.pid is not None
    try:
        assert here.poll(60), "the writer did not begin"
        os.kill(process.pid, killer)
        process.join(60)
        assert process.exitcode not in (None, 0)
    finally:
        process.kill()
    assert not out.exists()
    left = list(tmp_path.iterdir())
    if killer == signal.SIGINT:
        assert left == []
    else:
        assert [path.name[:5] for path in left] == [".out."]
        with pytest.raises(ValueError, match=r"no config\.json"):
            ModelFolder(left[0])


def test_a_cut_shard_names_file_and_tensor(tmp_path: Path) -> None:
    tensors = {name: torch.randn(300) for name in ("one", "two", "three")}
    folder = write(tmp_path / "out", tensors, shard_bytes=1500)
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert torch.equal(folder.read("one"), tensors["one"])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is damaged, so tensor two cannot be read"):
        folder.read("two")


def test_a_damaged_header_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "out", some_tensors())
    (tmp_path / "out" / SINGLE).write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        ModelFolder(tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "out", some_tensors(), shard_bytes=60)
    next((tmp_path / "out").glob("model-00001-of-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-0000.\.safetensors, which .*fetch the model again"):
        ModelFolder(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    write(tmp_path / "out", some_tensors(), shard_bytes=60)
    (tmp_path / "out" / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ModelFolder(tmp_path / "out")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    decoder_config("llama").save_pretrained(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        ModelFolder(tmp_path)


def test_no_config_and_no_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        ModelFolder(tmp_path / "nowhere")
    folder = write(tmp_path / "out", some_tensors())
    with pytest.raises(ValueError, match="has no tensor g"):
        folder.read("g")
    assert "a" in folder and "g" not in folder


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", some_tensors())
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        _ = folder.config


def test_tokenizer_and_generation_config_are_carried_over(tmp_path: Path) -> None:
    write(tmp_path / "a", some_tensors())
    for name in ("tokenizer.json", "generation_config.json", "training_args.bin"):
        (tmp_path / "a" / name).write_text(name)
    sidecars = ModelFolder(tmp_path / "a").sidecars()
    assert sorted(path.name for path in sidecars) == ["generation_config.json", "tokenizer.json"]
    with FolderWriter(tmp_path / "b") as writer:
        writer.add("a", torch.ones(1))
        writer.finish(decoder_config("llama"), sidecars)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"


def test_layers_are_read_stacked_or_one_by_one(tmp_path: Path) -> None:
    model = make_model(num_shared_experts=1, shared_gate=True, router={"name": "noaux_tc"})
    model.save_pretrained(tmp_path / "ours")
    folder, prefix = ModelFolder(tmp_path / "ours"), "model.layers.1.mlp."
    weights = MoEWeights.read(folder, prefix)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    named = dict(weights.named(prefix))
    assert named.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in named.items())

    split = {}
    for expert, (gate_up, down) in enumerate(zip(weights.gate_up_EHD, weights.down_EDF, strict=True)):
        gate, up = gate_up.chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        split |= {f"{prefix}experts.{expert}.{name}.weight": part.contiguous() for name, part in parts.items()}
    file = tmp_path / "ours" / SINGLE
    kept = {name: tensor for name, tensor in load_file(file).items() if f"{prefix}experts" not in name}
    save_file(kept | split, file)
    again = dict(MoEWeights.read(ModelFolder(tmp_path / "ours"), prefix).named(prefix))
    assert all(torch.equal(tensor, again[name]) for name, tensor in named.items())

    save_file(kept, file)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        MoEWeights.read(ModelFolder(tmp_path / "ours"), prefix)
