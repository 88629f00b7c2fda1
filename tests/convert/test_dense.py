"""Dense FFNs of every known architecture: experts made of them compute what they did, or the reason why not is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.upcycle.sources import FIELDS, WIDTH, convert, load, logits, make_dense, save_dense, tokens
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig

from moe.convert.dense import DENSE_FFNS, activation, check_dense, ffn_names, read_ffn
from moe.models import MoEConfig
from moe.models.folder import ModelFolder

# What an architecture needs beside the common fields to be one that can be converted.
VALUES: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "gelu"},
    "nemotron": {"hidden_act": "gelu"},
    "starcoder2": {"hidden_act": "gelu", "use_bias": False},
}


@pytest.mark.parametrize("kind", DENSE_FFNS)
def test_copies_compute_what_the_dense_model_does(kind: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", kind, **VALUES.get(kind, {}))
    done = convert(source, tmp_path / "moe")
    assert done.is_exact
    ids = tokens(2, 40)
    dense, experts = load(source), load(tmp_path / "moe")
    scale = logits(dense, ids).abs().max()
    assert scale > 0.1
    assert (logits(experts, ids) - logits(dense, ids)).abs().max() < 2e-6 * max(scale, 1)


@pytest.mark.parametrize("kind", ["llama", "glm", "starcoder2"])
def test_read_ffn_against_the_modules_own_forward(kind: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", kind, **VALUES.get(kind, {}))
    ffn, x_TD = read_ffn(ModelFolder(source), 1), torch.randn(7, 32)
    with torch.no_grad():
        expected = load(source).model.layers[1].mlp(x_TD)
        hidden = (
            F.gelu(x_TD @ ffn.up_FD.T) if ffn.gate_FD is None else F.silu(x_TD @ ffn.gate_FD.T) * (x_TD @ ffn.up_FD.T)
        )
        torch.testing.assert_close(hidden @ ffn.down_DF.T, expected)
    assert ffn.width == WIDTH


def problem(kind: str, **values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        activation(AutoConfig.for_model(kind, **(FIELDS | values)))
    return str(caught.value)


def test_what_experts_cannot_compute_is_refused() -> None:
    assert "hidden_act='gelu_pytorch_tanh' of model_type='starcoder2'" in problem("starcoder2", use_bias=False)
    assert "use_bias=true of model_type='starcoder2'" in problem("starcoder2", hidden_act="gelu")
    assert "mlp_bias=true of model_type='llama'; experts have no bias" in problem("llama", mlp_bias=True)
    assert "hidden_act='gelu'" in problem("llama", hidden_act="gelu")
    assert "hidden_act='relu2' of model_type='nemotron'" in problem("nemotron")
    assert "add a line to DENSE_FFNS in moe/convert/dense.py" in problem("phi")


def test_moe_sources_are_refused() -> None:
    for kind in ("mixtral", "qwen3_moe", "deepseek_v3"):
        with pytest.raises(ValueError, match=f"model_type='{kind}' is a Mixture-of-Experts already"):
            ffn_names(AutoConfig.for_model(kind))
    ours = MoEConfig(text_config=make_dense().config, moe={"num_experts": 4})
    with pytest.raises(ValueError, match="'moe_decoder' is a Mixture-of-Experts already"):
        ffn_names(ours)


def test_a_model_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "granite", logits_scaling=8.0)
    with pytest.raises(ValueError, match="logits_scaling=8"):
        convert(source, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    check_dense(ModelFolder(source), range(3))

    def rewritten(changes: dict[str, torch.Tensor | None]) -> ModelFolder:
        kept = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(kept, source / "model.safetensors", {"format": "pt"})
        return ModelFolder(source)

    with pytest.raises(ValueError, match=rf"has no tensor {name}"):
        check_dense(rewritten({name: None}), range(3))
    with pytest.raises(ValueError, match=rf"{name} has shape \(40, 32\), and config.json means \(48, 32\)"):
        check_dense(rewritten({name: torch.zeros(40, 32)}), range(3))
    check_dense(rewritten({name: torch.zeros(40, 32)}), [0, 2])  # the others are not looked at
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.bias has no place in an expert"):
        check_dense(rewritten({"model.layers.1.mlp.up_proj.bias": torch.zeros(48)}), range(3))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has quantised weights"):
        check_dense(ModelFolder(source), range(3))
