"""Comparing logits: the formulas, one model in memory at a time, and folders that do not load whole."""

import math
from pathlib import Path

import pytest
import torch
from models.tiny import make_model, tokens
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moe.models.compare import LogitsFile, compare_folders, compare_logits, load_folder, model_logits


def test_the_formulas() -> None:
    torch.manual_seed(0)
    a, b, ids = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    found = compare_logits(a, b, ids, far=2.0)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert found.max_diff == (a - b).abs().max().item()
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert found.same_top1 == (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    assert found.reference_rms == pytest.approx(a.square().mean().sqrt().item(), rel=1e-5)
    rms = a.square().mean((1, 2), keepdim=True).sqrt()
    assert found.share_far == ((a - b).abs() > 2.0 * rms).any(-1).double().mean().item()
    assert 0 < found.share_far < 1
    for logits, loss in ((a, found.reference_loss), (b, found.other_loss)):
        expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.tokens == 15


def test_the_same_is_the_same_and_nan_is_not() -> None:
    a, ids = torch.randn(2, 4, 6), torch.randint(0, 6, (2, 4))
    same = compare_logits(a, a, ids)
    assert (same.max_diff, same.kl, same.same_top1, same.share_far) == (0, 0, 1, 0)
    b = a.clone()
    b[0, 1, 2] = math.nan  # in the first window, so that a later maximum could hide it
    broken = compare_logits(a, b, ids)
    assert math.isnan(broken.max_diff) and math.isnan(broken.kl) and broken.share_far == 1 / 8


def test_other_vocabularies_and_numbers_of_windows_are_refused() -> None:
    ids = torch.randint(0, 6, (2, 4))
    with pytest.raises(ValueError, match="logits of 6 and of 7 tokens"):
        compare_logits(torch.randn(2, 4, 6), torch.randn(2, 4, 7), ids)
    with pytest.raises(ValueError, match="shorter"):
        compare_logits(torch.randn(2, 4, 6), torch.randn(1, 4, 6), ids)


def test_stored_logits_are_read_again(tmp_path: Path) -> None:
    logits = torch.randn(3, 4, 5)
    stored = LogitsFile(tmp_path / "logits", 3)
    stored.write(logits.to(torch.bfloat16))
    for _ in range(2):
        assert torch.equal(torch.stack(list(stored.windows(4))), logits.to(torch.bfloat16).float())


def test_folders(tmp_path: Path) -> None:
    first, second = make_model(seed=0).eval(), make_model("qwen3", seed=1).eval()
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    windows_BL, steps = tokens(3, 10), []
    found = compare_folders(tmp_path / "a", tmp_path / "b", windows_BL, progress=lambda *step: steps.append(step))
    assert steps == [(i, 6) for i in range(1, 7)]
    expected = compare_logits(model_logits(first, windows_BL), model_logits(second, windows_BL), windows_BL)
    assert found == expected and found.max_diff > 0.1
    assert compare_folders(tmp_path / "a", tmp_path / "a", windows_BL).max_diff == 0


def test_a_folder_that_does_not_load_whole_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.0.mlp.router.weight")
    save_file(tensors | {"model.layers.0.mlp.gate.weight": gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys: .*mlp\.router\.weight.*unexpected_keys: .*mlp\.gate\.weight"):
        load_folder(tmp_path / "a")
