"""`moe eval` through the command: comparing two models, tasks, and what users are told."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.model_folder import TEXT, write_mixtral, write_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from moe.cli import app

EXAMPLE = Path(__file__).parents[2] / "configs" / "eval" / "capitals.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our model ``ours``, a stock one ``mixtral`` with the same tokenizer, and ``text.txt``."""
    path = tmp_path_factory.mktemp("eval")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    write_model(path / "ours")
    write_mixtral(path / "mixtral")
    return path


def moe_eval(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "--device", "cpu", *map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    done = moe_eval(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@torch.no_grad()
def logits(path: Path, window: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, L) of the text and their logits (B, L, V)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    return windows, AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()(windows).logits.double()


@pytest.mark.parametrize("more", [[], ["--one-at-a-time"]])
def test_compared_with_a_stock_model(folder: Path, more: list[str]) -> None:
    """All figures against their definitions, in float64 on whole tensors."""
    result = found(
        "--compare", folder / "mixtral", folder / "ours", "--text", folder / "text.txt", "--window", 16, *more
    )
    windows, p = logits(folder / "mixtral", 16)
    _, q = logits(folder / "ours", 16)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result["kl_p99"] == pytest.approx(np.percentile(kl.numpy(), 99), rel=1e-4)
    assert result["kl_p99"] > 1.1 * result["kl"]
    assert result["same_top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result["max_logit_diff"] == pytest.approx((p - q).abs().max().item(), rel=1e-4)
    for name, log in (("reference_perplexity", log_p), ("perplexity", log_q)):
        loss = -log[:, :-1].gather(2, windows[:, 1:, None]).mean().item()
        assert result[name] == pytest.approx(math.exp(loss), rel=1e-3)
    assert (result["model"], result["reference"]) == (str(folder / "ours"), str(folder / "mixtral"))
    assert (result["windows"], result["tokens"]) == (len(windows), windows.numel())
    alone = found(folder / "ours", "--text", folder / "text.txt", "--window", 16)
    assert alone["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)


def test_a_model_is_no_distance_from_itself(folder: Path) -> None:
    done = moe_eval(folder / "ours", "--compare", folder / "ours", "--text", folder / "text.txt")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "KL(reference || model) 0 nats per token, 99th percentile 0" in done.stderr
    assert "same most likely token at 100.00% of" in done.stderr


def test_the_window_is_what_the_model_takes(folder: Path) -> None:
    assert found(folder / "mixtral", "--text", folder / "text.txt")["window"] == 64


def test_dtype_of_the_computation(folder: Path) -> None:
    arguments = [folder / "ours", "--text", folder / "text.txt", "--window", 16]
    stored, half = found(*arguments), found(*arguments, "--dtype", "bf16")
    windows, log = logits(folder / "ours", 16, torch.bfloat16)
    log = log.log_softmax(-1)
    loss = -log[:, :-1].gather(2, windows[:, 1:, None]).mean().item()
    assert half["loss"] == pytest.approx(loss, rel=1e-3)
    assert half["loss"] != stored["loss"]
    assert found(*arguments, "--dtype", "fp32")["loss"] == stored["loss"]


def test_batches_change_nothing(folder: Path) -> None:
    arguments = [folder / "ours", "--text", folder / "text.txt", "--window", 8]
    assert found(*arguments, "--batch-size", 1)["loss"] == pytest.approx(found(*arguments)["loss"], rel=1e-5)


def test_tasks(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'moe-framework[eval]'")
    result = found(folder / "mixtral", "--tasks", EXAMPLE, "--limit", 3, "--num-fewshot", 1)
    (score,) = result["scores"]
    assert (score["task"], score["metric"], score["num_samples"], score["num_fewshot"]) == ("capitals", "acc", 3, 1)
    done = moe_eval(folder / "mixtral", "--tasks", f"{EXAMPLE.parent},capitals", "--limit", 3, "--num-fewshot", 1)
    assert done.stdout == ""
    assert f"capitals: acc {score['value']:.4f} ± {score['stderr']:.4f}, 3 questions, 1-shot" in done.stderr


def test_tasks_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = moe_eval(folder / "ours", "--tasks", EXAMPLE)
    assert done.exit_code == 2
    assert "pip install 'moe-framework[eval]'" in done.stderr


def test_options_that_do_not_go_together(folder: Path) -> None:
    model, text = folder / "ours", ["--text", folder / "text.txt"]
    for arguments, message in (
        ([], "give one of --text FILE and --tasks"),
        ([*text, "--tasks", EXAMPLE], "give one of --text FILE and --tasks"),
        ([*text, "--limit", 3], "--limit would do nothing"),
        ([*text, "--num-fewshot", 0, "--online"], "--num-fewshot, --online would do nothing"),
        (["--tasks", EXAMPLE, "--window", 8], "--window would do nothing"),
        (["--tasks", EXAMPLE, "--compare", model], "--compare would do nothing"),
        ([*text, "--one-at-a-time"], "--one-at-a-time would do nothing"),
        ([*text, "--compare", model, "--batch-size", 2], "--batch-size would do nothing"),
        ([*text, "--dtype", "fp16"], "--dtype 'fp16' is unknown; use auto, fp32, bf16"),
        ([*text, "--device", "tpu"], "--device 'tpu' is not here; use cpu"),
        ([*text, "--compare", folder / "none"], "none' has no config.json"),
    ):
        done = moe_eval(model, *arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        assert message in done.stderr, arguments


def test_other_tokenizers_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", text="numbers 1 2 3 4 and words\n" * 9)
    done = moe_eval(folder / "ours", "--compare", tmp_path / "other", "--text", folder / "text.txt")
    assert done.exit_code == 2
    assert all(name in done.stderr for name in ("ours", "other", "make different tokens")), done.stderr


def test_logits_that_do_not_fit_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    arguments = [folder / "ours", "--compare", folder / "mixtral", "--text", folder / "text.txt"]
    done = moe_eval(*arguments, "--one-at-a-time")
    assert done.exit_code == 2
    assert "which has 0.0 GB; lower --max-windows" in done.stderr
    assert moe_eval(*arguments).exit_code == 0


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    for file in (folder / "ours").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "router" in name)
    save_file(
        {name: w for name, w in weights.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    done = moe_eval(tmp_path, "--text", folder / "text.txt")
    assert done.exit_code == 2
    assert "lacks 1 weights" in done.stderr
    assert gone in done.stderr
