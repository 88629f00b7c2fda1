"""Verification sees every kind of damage that loads without a word, and runs stock folders without our code."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.stock.stock_cases import GATED, SIGMOID, TOP2, Case, make_case, make_stock
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.models.compare import compare_folders, compare_logits
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.family import Names
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model
from moe.models.verify import TEXT, check, measure, text_windows, tolerance

Tensors = dict[str, Tensor]
BLOCK = "model.layers.1.mlp."


def exported(tmp_path: Path, case: Case, dtype: torch.dtype | None = None) -> tuple[Path, Path]:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    make_case(case).save_pretrained(ours)
    write_model(reformat(ModelFolder(ours)), stock, case.to, dtype=dtype)
    return ours, stock


def swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def put(tensors: Tensors, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[name] = change(tensors[name]).contiguous()


def fill_nan(tensor: Tensor) -> Tensor:
    tensor[0, 0] = math.nan
    return tensor


DAMAGE: dict[str, Callable[[Tensors], None]] = {
    "gate and up of an expert": lambda t: swap(
        t, f"{BLOCK}experts.0.gate_proj.weight", f"{BLOCK}experts.0.up_proj.weight"
    ),
    "two experts": lambda t: swap(t, f"{BLOCK}experts.0.down_proj.weight", f"{BLOCK}experts.3.down_proj.weight"),
    "a zero router": lambda t: put(t, f"{BLOCK}gate.weight", torch.zeros_like),
    "rolled router": lambda t: put(t, f"{BLOCK}gate.weight", lambda weight: weight.roll(1, 0)),
    "no selection bias": lambda t: put(t, f"{BLOCK}gate.e_score_correction_bias", lambda bias: bias * 0),
    "half the shared experts": lambda t: put(t, f"{BLOCK}shared_experts.down_proj.weight", lambda down: down / 2),
    "queries in another order": lambda t: put(t, "model.layers.0.self_attn.q_proj.weight", lambda q: q.roll(4, 0)),
    "a norm": lambda t: put(t, "model.norm.weight", torch.ones_like),
    "one nan": lambda t: put(t, f"{BLOCK}experts.2.up_proj.weight", fill_nan),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_damage_that_loads_is_seen(damage: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    ours, stock = exported(tmp_path, Case("llama", "glm4_moe", SIGMOID), dtype)
    windows_BL, load_as = text_windows(ours, TEXT, 64, 2), dtype or torch.float32
    far = tolerance(stock, is_rewritten=True)
    check(compare_folders(ours, stock, windows_BL, dtype=load_as, far=far), far)
    tensors = load_file(stock / "model.safetensors")
    DAMAGE[damage](tensors)
    save_file(tensors, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not compute what its source does"):
        check(compare_folders(ours, stock, windows_BL, dtype=load_as, far=far), far)


def test_one_nan_is_enough() -> None:
    logits, ids = torch.randn(2, 128, 5), torch.randint(0, 5, (2, 128))
    broken = logits.clone()
    broken[0, 7, 3] = math.nan
    check(compare_logits(logits, logits, ids), 1e-3)
    with pytest.raises(ValueError, match=r"0\.4% of 256 tokens differ"):
        check(compare_logits(logits, broken, ids), 1e-3)


def test_stock_folders_run_without_us(tmp_path: Path) -> None:
    """A half-precision export with a folded scale: the reference is rounded as the export was."""
    scaled = Case("qwen2", "qwen2_moe", {"router": {"name": "topk", "route_scale": 1.5}} | GATED)
    ours, stock = exported(tmp_path, scaled, torch.float16)
    windows_BL = text_windows(ours, TEXT, 32, 2)
    far = tolerance(stock, is_rewritten=True)
    assert far == 1e-2 and tolerance(stock, is_rewritten=False) == 1e-3
    found = measure(ours, stock, windows_BL, torch.float16, far)
    check(found, far)
    assert found.max_diff > 0 and found.tokens == 64
    # In the same process it computes the same: the process apart changes nothing but what is imported.
    here = compare_folders(ours, stock, windows_BL, dtype=torch.float32, far=far)
    assert found.other_loss == pytest.approx(here.other_loss, rel=1e-5)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    ours, stock = exported(tmp_path, Case("llama", "mixtral", TOP2))
    tensors = load_file(stock / "model.safetensors")
    tensors["model.layers.1.extra"] = tensors.pop("model.layers.1.block_sparse_moe.gate.weight")
    save_file(tensors, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"MixtralForCausalLM does not load .*missing.*mlp\.gate\.weight.*extra"):
        measure(ours, stock, text_windows(ours, TEXT, 32, 1))


def test_a_wrong_format_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs before the folder has its name."""
    make_case(Case("llama", "mixtral", TOP2)).save_pretrained(tmp_path / "ours")
    wrong = Names(block="block_sparse_moe", gate="w3", up="w1", down="w2")
    monkeypatch.setattr(type(FORMATS["mixtral"]), "names", wrong)
    windows_BL = text_windows(tmp_path / "ours", TEXT, 32, 1)

    def verify(folder: Path) -> None:
        check(compare_folders(tmp_path / "ours", folder, windows_BL), 1e-3)

    with pytest.raises(ValueError, match="does not compute what its source does"):
        write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "stock", "mixtral", check=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_windows_of_text(tmp_path: Path) -> None:
    make_stock("mixtral", tmp_path)
    windows_BL = text_windows(tmp_path)
    assert windows_BL.shape == (4, 128) and windows_BL.max() < 48  # bytes, since there is no tokenizer
    with pytest.raises(ValueError, match="less than one window of 128"):
        text_windows(tmp_path, "short", 1000)
