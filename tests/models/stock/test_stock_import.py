"""Stock models made by transformers: imported they compute the same, train with the stock balance loss, and go back bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.stock.stock_cases import STOCK, greedy, logits, make_stock
from models.tiny import decoder_config, layers_of, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.models import MoEForCausalLM
from moe.models.compare import load_folder
from moe.models.folder import ModelFolder
from moe.models.stock.reformat import reformat, source_format
from moe.models.stock.write import write_model

BIAS_RULE = ("glm4_moe", "dots1", "deepseek_v3")


def imported(source: Path, out: Path) -> MoEForCausalLM:
    write_model(reformat(ModelFolder(source)), out, "moe")
    model = load_folder(out, torch.float32)
    assert isinstance(model, MoEForCausalLM)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", STOCK)
def test_imported_it_computes_the_same_and_goes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    stock = make_stock(name, tmp_path / "stock")
    ours = imported(tmp_path / "stock", tmp_path / "ours")
    ids_BL = tokens(3, 40)
    expected = logits(stock, ids_BL)
    torch.testing.assert_close(logits(ours, ids_BL), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(greedy(ours, ids_BL[:1, :5]), greedy(stock, ids_BL[:1, :5]))

    to = source_format(ModelFolder(tmp_path / "stock"))
    write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "back", to)
    before, after = tensors(tmp_path / "stock"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert torch.equal(tensor, after[tensor_name]), tensor_name
    assert logits(load_folder(tmp_path / "back", torch.float32), ids_BL).equal(expected)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "back")]
    # Fields that say the same twice, in other words.
    same_meaning = {"decoder_sparse_step", "mlp_only_layers", "num_nextn_predict_layers", "layer_types", "head_dim"}
    kept = [{key: value for key, value in config.items() if key not in same_meaning} for config in configs]
    differing = {key for key in kept[0].keys() | kept[1].keys() if kept[0].get(key) != kept[1].get(key)}
    assert differing <= {"max_window_layers"}, {key: (kept[0].get(key), kept[1].get(key)) for key in differing}


@pytest.mark.parametrize("name", STOCK)
def test_imported_it_trains(name: str, tmp_path: Path) -> None:
    stock = make_stock(name, tmp_path / "stock")
    ours = imported(tmp_path / "stock", tmp_path / "ours").train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    ids_BL = tokens(4, 16)
    first = ours(ids_BL, labels=ids_BL).loss
    first.backward()
    layers = layers_of(ours)
    has_loss = hasattr(stock.config, "router_aux_loss_coef")
    assert has_loss == (stock.config.model_type not in BIAS_RULE)
    for layer in layers:
        assert ("loss/switch" in layer.stats.sums) == has_loss
        assert layer.experts.down_proj.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        assert ours(ids_BL, labels=ids_BL).loss < first
    # What `save_pretrained` writes after training goes back as well, also where transformers stores experts one by one.
    ours.eval().save_pretrained(tmp_path / "trained")
    write_model(reformat(ModelFolder(tmp_path / "trained")), tmp_path / "back", stock.config.model_type)
    expected = logits(ours, ids_BL)
    got = logits(load_folder(tmp_path / "back", torch.float32), ids_BL)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_loss_has_the_gradient_of_the_stock_one(top_k: int, tmp_path: Path) -> None:
    """With one layer both pool the same tokens, so the whole gradient of the router is the same."""
    stock = make_stock(
        "qwen3_moe",
        tmp_path / "stock",
        num_hidden_layers=1,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
    )
    ours = imported(tmp_path / "stock", tmp_path / "ours").train()
    ids_BL = tokens(4, 16)
    ours(ids_BL, labels=ids_BL).loss.backward()
    stock.train()(ids_BL, labels=ids_BL).loss.backward()
    got, expected = layers_of(ours)[0].router.weight.grad, stock.model.layers[0].mlp.gate.weight.grad
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    stock.zero_grad()
    stock(ids_BL, labels=ids_BL, output_router_logits=False).loss.backward()
    alone = stock.model.layers[0].mlp.gate.weight.grad
    assert (alone - expected).norm() > 0.1 * expected.norm()  # the loss is a part of what was compared


def test_layers_above_the_last_one_stay_behind(tmp_path: Path) -> None:
    """Released GLM-4.5 and DeepSeek-V3 checkpoints have a multi-token prediction layer there."""
    stock = make_stock("glm4_moe", tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    ours = imported(tmp_path / "stock", tmp_path / "ours")
    ids_BL = tokens(1, 9)
    torch.testing.assert_close(logits(ours, ids_BL), logits(stock, ids_BL), rtol=0, atol=1e-4)


def test_a_shared_expert_of_odd_width_is_padded(tmp_path: Path) -> None:
    stock = make_stock("qwen2_moe", tmp_path / "stock", shared_expert_intermediate_size=12)
    ours = imported(tmp_path / "stock", tmp_path / "ours")
    assert ours.config.spec.num_shared_experts == 2  # of width 8
    ids_BL = tokens(2, 20)
    expected = logits(stock, ids_BL)
    torch.testing.assert_close(logits(ours, ids_BL), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("mixtral", {}, "llama"),
        ("mixtral-window", {}, "mistral"),
        ("qwen2_moe", {}, "qwen2"),
        ("qwen2_moe", {"qkv_bias": False}, "llama"),
        ("qwen3_moe", {}, "qwen3"),
        ("glm4_moe", {}, "glm4_moe"),
        ("glm4_moe", {"partial_rotary_factor": 1.0}, "qwen2"),
        ("glm4_moe", {"partial_rotary_factor": 1.0, "attention_bias": False}, "llama"),
        ("glm4_moe-whole", {}, "qwen3"),
        ("glm4_moe-whole", {"attention_bias": True}, "glm4_moe"),
        ("dots1", {}, "qwen3"),
    ],
)
def test_the_decoder_is_the_plainest_one(name: str, changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    stock = make_stock(name, tmp_path / "stock", **changes)
    ours = imported(tmp_path / "stock", tmp_path / "ours")
    assert ours.config.text_config.model_type == kind
    ids_BL = tokens(1, 20)
    torch.testing.assert_close(logits(ours, ids_BL), logits(stock, ids_BL), rtol=0, atol=1e-4)


def test_a_glm_deeper_than_46_layers_loads_whole(tmp_path: Path) -> None:
    """Transformers ignores unexpected tensors of layer 46, which in a deeper model is a layer like any other."""
    make_stock("glm4_moe-whole", tmp_path / "stock", num_hidden_layers=47, n_routed_experts=2, n_shared_experts=1)
    write_model(reformat(ModelFolder(tmp_path / "stock")), tmp_path / "again", "glm4_moe")
    written = tensors(tmp_path / "again")
    above = {name: tensor for name, tensor in written.items() if name.startswith("model.layers.46.self_attn")}
    assert len(above) == 6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in above.items():
        assert torch.equal(loaded[name], tensor), name


def test_dense_and_unknown_models_are_refused(tmp_path: Path) -> None:
    decoder_config("llama").save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model_type='llama', which is none of moe, mixtral.*moe upcycle"):
        reformat(ModelFolder(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "no MoE layer"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "first_k_dense_replace=3 leaves no MoE"),
    ],
)
def test_what_we_cannot_express_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_stock(name, tmp_path / "stock", **changes)
    with pytest.raises(ValueError, match=message):
        reformat(ModelFolder(tmp_path / "stock"))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    make_stock("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized weights \(fp8\)"):
        reformat(ModelFolder(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_an_imported_model_loads_in_the_dtype_that_it_is_written_in(dtype: torch.dtype | None, tmp_path: Path) -> None:
    make_stock("qwen3_moe", tmp_path / "stock")
    source = ModelFolder(tmp_path / "stock")
    write_model(reformat(source), tmp_path / "ours", "moe", dtype=dtype)
    model = load_folder(tmp_path / "ours", "auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert source.config.dtype == torch.float32
    ours = ModelFolder(tmp_path / "ours")
    write_model(reformat(ours), tmp_path / "half", "moe", dtype=torch.float16)
    assert load_folder(tmp_path / "half", "auto").dtype == torch.float16
    assert ours.config.dtype == (dtype or torch.float32)  # the source's config is not touched


def test_stock_to_stock(tmp_path: Path) -> None:
    """A Mixtral of one expert per token is a GLM4-MoE, too: its weight is 1 whatever the score."""
    stock = make_stock("mixtral-top1", tmp_path / "stock")
    write_model(reformat(ModelFolder(tmp_path / "stock")), tmp_path / "glm", "glm4_moe")
    ids_BL = tokens(2, 20)
    expected = logits(stock, ids_BL)
    got = logits(load_folder(tmp_path / "glm", torch.float32), ids_BL)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
