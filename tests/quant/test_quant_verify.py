"""A damaged folder is found out, and a sound one runs in stock software with our logits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.stock.stock_cases import make_stock
from quant.containers.quantized_folders import scheme_of, source_folder, write_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.models.compare import load_folder
from moe.models.folder import SINGLE, ModelFolder
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model
from moe.quant.verify import chosen_experts, router_agreement, scan, verify_folder

STEM = "model.layers.1.block_sparse_moe.experts.2.w1"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    source = source_folder("mixtral", path / "source")
    write_quantized(source, path, path / "w4a16", scheme_of("w4a16", 32), "compressed-tensors", torch.bfloat16)
    write_quantized(source, path, path / "w4a8", scheme_of("w4a8", 32), "compressed-tensors", torch.bfloat16)
    return path


def changed(folder: Path, out: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> ModelFolder:
    """A copy in which one tensor is another, or missing."""
    shutil.copytree(folder, out)
    tensors = load_file(out / SINGLE)
    new = change(tensors.pop(name))
    save_file(tensors if new is None else tensors | {name: new}, out / SINGLE)
    return ModelFolder(out)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (f"{STEM}.weight_scale", filled(float("nan")), "not finite"),
        (f"{STEM}.weight_scale", filled(float("inf")), "not finite"),
        (f"{STEM}.weight_scale", filled(0.0), "gate_up_proj has scales that are not positive"),
        (f"{STEM}.weight_scale", filled(-1.0), "not positive"),
        (f"{STEM}.weight_packed", lambda _: None, f"no tensor {STEM}.weight_packed"),
        (f"{STEM}.weight_scale", lambda _: None, f"{STEM}.weight"),
        (f"{STEM}.weight_scale", lambda scale: scale[:, :2].contiguous(), "layer 1 cannot be read"),
        ("model.layers.0.block_sparse_moe.gate.weight", filled(float("nan")), "gate.weight has values"),
        ("model.layers.2.self_attn.q_proj.weight_packed", lambda _: None, "q_proj.weight_packed"),
        ("model.layers.2.input_layernorm.weight", lambda _: None, "layers.2.input_layernorm.weight is missing"),
        ("model.layers.2.input_layernorm.weight", lambda norm: norm[:5].clone(), r"shape \(5,\) instead of \(128,\)"),
        ("lm_head.weight", lambda _: None, "lm_head.weight is missing"),
    ],
)
def test_damage_is_found(
    name: str, change: Callable[[Tensor], Tensor | None], expected: str, quantized: Path, tmp_path: Path
) -> None:
    folder = changed(quantized / "w4a16", tmp_path / "out", name, change)
    with pytest.raises(ValueError, match=expected):
        verify_folder(folder.path, torch.tensor([[2, 3]]))


def test_a_sound_folder_has_no_problems(quantized: Path) -> None:
    assert scan(ModelFolder(quantized / "w4a16")) == []
    assert scan(ModelFolder(quantized / "w4a8")) == []


@pytest.mark.parametrize(("name", "by"), [("w4a16", "transformers"), ("w4a8", "compressed-tensors and transformers")])
def test_stock_software_has_our_logits(name: str, by: str, quantized: Path) -> None:
    """transformers does not load int-quantized experts, so the package decompresses those."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    found = verify_folder(quantized / name, torch.randint(2, 48, (2, 24)))
    assert found.loaded_by == by
    assert found.logits is not None and found.logits.max_diff < 1e-4 and found.logits.share_far == 0


def test_other_codes_are_other_logits(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stock software is given differs from what we read."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    changed(quantized / "w4a16", tmp_path / "out", "model.layers.0.self_attn.o_proj.weight_packed", torch.bitwise_not)
    from moe.quant import verify

    load = verify.load_simulated
    monkeypatch.setattr(verify, "load_simulated", lambda _, **how: load(quantized / "w4a16", **how))
    with pytest.raises(ValueError, match="does not compute what its source does"):
        verify_folder(tmp_path / "out", torch.randint(2, 48, (2, 24)))


def test_router_agreement(tmp_path: Path) -> None:
    """All with itself, by hand with a changed router."""
    make_stock("mixtral", tmp_path / "stock")
    write_model(reformat(ModelFolder(tmp_path / "stock")), tmp_path / "ours", "moe")
    model = load_folder(tmp_path / "ours")
    windows_BL = torch.randint(2, 48, (3, 8))
    before = chosen_experts(model, windows_BL)
    assert all(chosen.shape == (24, 4) and (chosen.sum(1) == 2).all() for chosen in before.values())
    assert list(router_agreement(before, before).values()) == [1.0] * 3
    weight_ED = model.model.layers[1].mlp.router.weight
    with torch.no_grad():
        weight_ED.copy_(weight_ED[[1, 0, 2, 3]])
    after = chosen_experts(model, windows_BL)
    first, second, _ = before
    agreement = router_agreement(before, after)
    assert agreement[first] == 1.0
    assert torch.equal(after[second], before[second][:, [1, 0, 2, 3]])
    both = (before[second] & after[second]).sum() / 48
    assert agreement[second] == pytest.approx(float(both)) and agreement[second] < 1
