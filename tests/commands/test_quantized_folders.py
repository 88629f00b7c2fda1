"""`moe generate` and `moe eval` on quantised folders: packed or simulated, and a line that says so."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folder import TEXT, write_tokenizer
from quant.containers.quantized_folders import scheme_of, source_folder, write_quantized
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from moe.cli import app
from moe.quant.load import load_simulated
from moe.quant.schemes import COMPRESSED_TENSORS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``w4a16`` and ``w8a8`` of one model, and ``text.txt``."""
    path = tmp_path_factory.mktemp("quantized")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    vocab = write_tokenizer(path / "tokenizer")
    source = source_folder("mixtral", path / "source", vocab_size=vocab, bos_token_id=None, eos_token_id=0)
    for name, group_size in (("w4a16", 32), ("w8a8", None)):
        (path / name).mkdir()
        write_quantized(source, path / name, path / name / "out", scheme_of(name, group_size), COMPRESSED_TENSORS)
        write_tokenizer(path / name / "out")
    return path


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def simulated_loss(folder: Path, window: int) -> float:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    windows_BL = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    with torch.no_grad():
        logits_BLV = load_simulated(folder)(windows_BL).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), windows_BL[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("name", "more", "says", "tolerance"),
    [
        ("w4a16", [], "w4a16: packed weights, activations in torch.bfloat16", 1e-2),
        ("w4a16", ["--dtype", "fp32"], "w4a16: packed weights, activations in torch.float32", 1e-5),
        ("w8a8", [], "w8a8: simulated, with the memory and the time of a model in full precision", 1e-5),
    ],
)
def test_eval(name: str, more: list[str], says: str, tolerance: float, folders: Path) -> None:
    folder = folders / name / "out"
    done = run("eval", folder, "--text", folders / "text.txt", "--window", 16, "--device", "cpu", "--json", *more)
    assert says in done.stderr
    expected = math.exp(simulated_loss(folder, 16))
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("more", [[], ["--one-at-a-time"]])
def test_compared_with_the_source(more: list[str], folders: Path) -> None:
    write_tokenizer(folders / "source")
    found: dict[str, Any] = {}
    for name in ("w4a16", "w8a8"):
        arguments = ["--compare", folders / "source", "--text", folders / "text.txt", "--window", 16, "--device", "cpu"]
        found[name] = json.loads(run("eval", folders / name / "out", *arguments, "--json", *more).stdout)
    assert 0 < found["w8a8"]["kl"] < found["w4a16"]["kl"], "8 bits are nearer than 4"


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_generate(name: str, folders: Path) -> None:
    done = run("generate", folders / name / "out", "--prompt", "the cat", "--max-new-tokens", 5, "--device", "cpu")
    assert done.stdout.startswith("the cat")
    assert f"quantised to {name}: " in done.stderr
    assert "quantised" not in done.stdout


def test_a_dtype_that_simulation_does_not_have(folders: Path) -> None:
    arguments = ["--text", folders / "text.txt", "--window", 16, "--device", "cpu", "--dtype", "bf16"]
    done = CliRunner().invoke(app, list(map(str, ["eval", folders / "w8a8" / "out", *arguments])))
    assert done.exit_code == 2
    assert "simulated in fp32; leave --dtype out" in done.stderr
