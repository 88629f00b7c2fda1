"""Branch-Train-MiX: whose FFN becomes which expert, what is averaged, and which models do not go together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.upcycle.sources import load, logits, save_dense, tokens
from safetensors.torch import load_file, save_file

from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.btx import average
from moe.convert.upcycle.run import Upcycled, upcycle
from moe.models.folder import ModelFolder


def mix(sources: list[Path], out: Path, **options: Any) -> Upcycled:
    return upcycle(sources, out, UpcycleOptions(**({"num_experts": len(sources), "method": "btx"} | options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_averages(dtype: torch.dtype, tmp_path: Path) -> None:
    """Six experts of three models, against tensors put together by hand."""
    sources = [save_dense(tmp_path / str(seed), "qwen2", seed, dtype) for seed in range(3)]
    done = mix(sources, tmp_path / "moe", num_experts=6)
    assert not done.is_exact
    dense = [load_file(source / "model.safetensors") for source in sources]
    found = load_file(tmp_path / "moe" / "model.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if ".mlp." not in name:
            mean = sum(weights[name].double() for weights in dense) / 3
            torch.testing.assert_close(tensor, mean.to(dtype), atol=1e-7 if dtype == torch.float32 else 0, rtol=1e-7)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        for expert in range(6):
            source = dense[expert // 2]
            gate_up = torch.cat([source[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")])
            assert torch.equal(found[f"{prefix}experts.gate_up_proj"][expert], gate_up)
            assert torch.equal(found[f"{prefix}experts.down_proj"][expert], source[f"{prefix}down_proj.weight"])


def test_layers_that_stay_dense_are_averaged(tmp_path: Path) -> None:
    sources = [save_dense(tmp_path / str(seed), seed=seed) for seed in range(2)]
    mix(sources, tmp_path / "moe", layers="1")
    name = "model.layers.0.mlp.down_proj.weight"
    first, second = (load_file(source / "model.safetensors")[name] for source in sources)
    torch.testing.assert_close(load_file(tmp_path / "moe" / "model.safetensors")[name], (first + second) / 2)


def test_equal_models_give_the_function_of_one(tmp_path: Path) -> None:
    source, ids = save_dense(tmp_path / "dense"), tokens(2, 30)
    mix([source, source], tmp_path / "moe")
    assert (logits(load(tmp_path / "moe"), ids) - logits(load(source), ids)).abs().max() < 1e-5


def test_averages_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [ModelFolder(save_dense(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    name = "model.embed_tokens.weight"
    whole = average(folders, name)
    monkeypatch.setattr("moe.convert.upcycle.btx._CHUNK", 7)
    assert torch.equal(average(folders, name), whole)
    assert torch.equal(whole, (folders[0].read(name) + folders[1].read(name)) / 2)


def test_models_of_different_kinds_are_refused(tmp_path: Path) -> None:
    first = save_dense(tmp_path / "first")

    def refused(second: Path, **options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            mix([first, second], tmp_path / "moe", **options)
        return str(caught.value)

    message = refused(save_dense(tmp_path / "vocab", vocab_size=80))
    assert "vocab has vocab_size=80, and" in message
    assert "first has 96" in message
    assert "model_type='mistral'" in refused(save_dense(tmp_path / "kind", "mistral"))
    assert "rms_norm_eps" in refused(save_dense(tmp_path / "eps", rms_norm_eps=1e-3))

    other = save_dense(tmp_path / "other", seed=1)
    assert "--experts 3 is not a multiple of the 2 models" in refused(other, num_experts=3)
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"extra": torch.zeros(1)}, other / "model.safetensors", {"format": "pt"})
    assert "extra is in one of" in refused(other)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: torch.zeros(3, 32)}, other / "model.safetensors", {"format": "pt"})
    assert f"{name} has shape (3, 32) in" in refused(other)

    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for folder, vocabulary in ((first, {"a": 0, "b": 1}), (other, {"a": 1, "b": 0})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert "the tokenizers of" in refused(other)
    assert not (tmp_path / "moe").exists()


def test_one_model_is_not_enough_and_other_methods_take_one(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="give the others with --also"):
        mix([source], tmp_path / "moe", num_experts=2)
    with pytest.raises(ValueError, match="--also with --method copy"):
        mix([source, source], tmp_path / "moe", method="copy")
