"""Ours -> stock -> ours: logits, generation, tensors, and the names and shapes that transformers itself writes."""

from pathlib import Path

import pytest
import torch
from models.stock.stock_cases import CASES, Case, greedy, logits, make_case
from models.tiny import tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe.models.compare import load_folder
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_survives_the_way_there_and_back(case: Case, tmp_path: Path) -> None:
    model = make_case(case)
    model.save_pretrained(tmp_path / "ours")
    write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "stock", case.to)
    stock = load_folder(tmp_path / "stock", torch.float32)
    assert type(stock).__name__ == stock.config.architectures[0] and "moe." not in type(stock).__module__[:4]

    ids_BL = tokens(3, 40)
    expected = logits(model, ids_BL)
    torch.testing.assert_close(logits(stock, ids_BL), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(greedy(stock, ids_BL[:1, :5]), greedy(model, ids_BL[:1, :5]))

    AutoModelForCausalLM.from_config(stock.config).save_pretrained(tmp_path / "theirs")
    written, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}

    write_model(reformat(ModelFolder(tmp_path / "stock")), tmp_path / "back", "moe")
    back = load_folder(tmp_path / "back", torch.float32)
    torch.testing.assert_close(logits(back, ids_BL), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert bool(FORMATS[case.to].notes(model.config)) == case.rewritten
    if not case.rewritten:
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
        before = {name: tensor for name, tensor in before.items() if "noise_weight" not in name}  # of training only
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name


def test_selection_bias_stays_fp32_and_the_rest_becomes_half(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.to == "glm4_moe")
    make_case(case).save_pretrained(tmp_path / "ours")
    source = ModelFolder(tmp_path / "ours")
    write_model(reformat(source), tmp_path / "stock", "glm4_moe", dtype=torch.bfloat16)
    written = load_file(tmp_path / "stock" / "model.safetensors")
    assert {name.rsplit(".", 1)[-1] for name, tensor in written.items() if tensor.dtype == torch.float32} == {
        "e_score_correction_bias"
    }
    assert {tensor.dtype for tensor in written.values()} == {torch.float32, torch.bfloat16}
    assert ModelFolder(tmp_path / "stock").config.dtype == torch.bfloat16
    assert source.config.dtype == torch.float32  # the source's config is not touched


@pytest.mark.parametrize("scale", [2.0, 1.7])
def test_a_folded_scale_is_rounded_once(scale: float, tmp_path: Path) -> None:
    router = {"name": "topk", "top_k": 2, "route_scale": scale}
    model = make_case(Case("llama", "mixtral", {"router": router})).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "stock", "mixtral")
    got = load_file(tmp_path / "stock" / "model.safetensors")["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    exact = model.model.layers[0].mlp.experts.down_proj[1].detach().double() * scale
    assert torch.equal(got, exact.to(torch.bfloat16))


def test_shared_experts_of_qwen2_have_a_gate_that_is_half_and_not_zero(tmp_path: Path) -> None:
    model = make_case(Case("qwen2", "qwen2_moe", {"router": {"name": "topk"}, "num_shared_experts": 1}))
    model.save_pretrained(tmp_path / "ours")
    write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "stock", "qwen2_moe", dtype=torch.float16)
    gate = load_file(tmp_path / "stock" / "model.safetensors")["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.count_nonzero() == 1 and 0 < gate.max() < 1e-6
