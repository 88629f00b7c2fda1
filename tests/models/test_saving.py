"""`save_pretrained` and `from_pretrained`: bit-equal logits, safetensors only, dtypes, missing weights, shards."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import layers_of, make_model, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe.models import MoEConfig, MoEForCausalLM

NOAUX = {"router": {"name": "noaux_tc"}, "balance": {"bias_update_rate": 1e-3}}


def saved_model(path: Path, kind: str = "llama", **options: Any) -> MoEForCausalLM:
    model = make_model(kind, num_shared_experts=1, **(NOAUX | options)).eval()
    for layer in layers_of(model):
        if "bias_E" in dict(layer.router.named_buffers()):
            layer.router.bias_E.copy_(torch.randn(4))
    model.save_pretrained(path, max_shard_size=options.pop("max_shard_size", "5GB"))
    return model


def bias(model: torch.nn.Module) -> Tensor:
    return torch.stack([layer.router.bias_E for layer in layers_of(model)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_logits_survive_bit_for_bit(kind: str, tied: bool, tmp_path: Path) -> None:
    model = saved_model(tmp_path, kind, decoder={"tie_word_embeddings": tied})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MoEForCausalLM
    assert not any(info.values()), info
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert torch.equal(bias(loaded), bias(model))
    assert bias(model).abs().min() > 0
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.config.spec == model.config.spec
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoEConfig
    assert torch.equal(MoEForCausalLM.from_pretrained(tmp_path)(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_the_folder_holds_safetensors_only(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MoEForCausalLM"]


def test_shards(tmp_path: Path) -> None:
    model = make_model(num_shared_experts=1).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_the_bias_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert bias(loaded).dtype == torch.float32
    assert torch.equal(bias(loaded), bias(model))
    assert not torch.equal(bias(model).to(dtype).float(), bias(model)), "rounding would not show"
    converted = copy.deepcopy(model).to(dtype).state_dict()
    assert all(torch.equal(value, converted[name]) for name, value in loaded.state_dict().items())
    assert loaded(tokens(2, 9)).logits.isfinite().all()


def test_a_bf16_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = make_model(**NOAUX).eval()
    for layer in layers_of(model):
        layer.router.bias_E.copy_(torch.randn(4))
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: value.dtype for name, value in stored.items() if value.dtype != torch.bfloat16} == {
        f"model.layers.{layer}.mlp.router.bias_E": torch.float32 for layer in range(2)
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(bias(loaded), bias(model))
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_missing_weights_are_initialised_and_reported(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    missing = {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.router.bias_E",
        "model.layers.0.mlp.shared_experts.down_proj.weight",
    }
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file({name: value for name, value in stored.items() if name not in missing}, path, {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name, value in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(value, stored[name]), f"{name} was loaded and then changed"
        elif name.endswith("bias_E"):
            assert (value == 0).all()
        else:
            assert not torch.equal(value, stored[name])
            spread = (value.std() / model.config.text_config.initializer_range).item()
            assert spread == pytest.approx(1, abs=5 / (2 * value.numel()) ** 0.5), name
    assert loaded(tokens(2, 9)).logits.isfinite().all()


def test_unexpected_weights_are_reported(tmp_path: Path) -> None:
    saved_model(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(1)}, path, {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded.cpu()(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_layers_on_disk(tmp_path: Path) -> None:
    """Weights come in module by module; experts and routers must be modules that own what they use."""
    model = saved_model(tmp_path / "model")
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.1"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.0": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[0].mlp.experts.down_proj.device.type == "meta"
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_wrong_key_in_a_saved_config(tmp_path: Path) -> None:
    saved_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["moe"]["num_shared_expert"] = config["moe"].pop("num_shared_experts")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"moe.num_shared_expert is not an option; did you mean 'num_shared_experts'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_copy_has_a_context_of_its_own() -> None:
    model = make_model()
    other = copy.deepcopy(model)
    assert other.routing_context is not model.routing_context
    assert all(layer.context is other.routing_context for layer in layers_of(other))


@pytest.mark.parametrize("look", ["state_dict", "eval"])
def test_the_last_step_of_a_loop_that_does_not_know_moe_is_not_lost(look: str) -> None:
    """Layers notice an optimizer step in the next micro-batch; a save or an evaluation may come first."""
    model = make_model(**NOAUX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = tokens(4, 9)
    model(ids, labels=ids).loss.backward()
    getattr(model, look)()
    assert (bias(model) == 0).all(), "moved before the step"
    counts = [layer.stats.counts_E.clone() for layer in layers_of(model)]
    optimizer.step()
    getattr(model, look)()
    expected = torch.stack([1e-3 * torch.sign(c.float().mean() - c) for c in counts])
    assert expected.abs().max() > 0
    assert torch.equal(bias(model), expected)
    getattr(model, look)()
    assert torch.equal(bias(model), expected), "moved twice"
    model.train()(ids, labels=ids).loss.backward()
    assert torch.equal(bias(model), expected)


def test_saving_on_one_rank_does_not_communicate() -> None:
    model = make_model(**NOAUX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in layers_of(model):
        layer.reduce_counts = lambda counts_E: pytest.fail("communicated")
    ids = tokens(4, 9)
    with pytest.raises(pytest.fail.Exception):
        layers_of(model)[0].reduce_counts(torch.ones(4))
    for layer in layers_of(model):
        layer.stats.add(torch.tensor([1, 2, 3, 4]), {})
        layer._router_version = 0
    optimizer.step()
    model.state_dict()
    model.eval()(ids)
