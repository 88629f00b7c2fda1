"""`moe quantize` through the real command line: every scheme, what comes out, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.model_folder import TEXT, write_mixtral, write_model
from typer.testing import CliRunner

from moe.cli import app
from moe.models.folder import ModelFolder
from moe.quant.report import REPORT_FILE
from moe.quant.schemes import SCHEMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with a tokenizer, and a text."""
    root = tmp_path_factory.mktemp("models")
    write_mixtral(root / "mixtral")
    write_model(root / "ours")
    lines = [line * 2 for line in TEXT.splitlines(keepends=True)]
    (root / "text.txt").write_text("".join(lines) * 8, encoding="utf-8")
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


def quantized(folder: Path, out: Path, scheme: str, *words: object, source: str = "mixtral") -> dict[str, Any]:
    """The command's JSON."""
    text = ("--calibration", folder / "text.txt", "--tokens", 256, "--window", 32)
    done = run(folder / source, out, "--scheme", scheme, *text, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refusal(folder: Path, out: Path, *words: object, source: str = "mixtral", text: bool = True) -> str:
    """The error message; nothing may be left behind."""
    more = ("--calibration", folder / "text.txt", "--tokens", 256, "--window", 32) if text else ()
    before = set(out.parent.iterdir())
    done = run(folder / source, out, *more, *words)
    assert done.exit_code == 2, done.output
    assert set(out.parent.iterdir()) == before
    return re.sub(r"\s+", " ", done.output)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, folder: Path, tmp_path: Path) -> None:
    """With the default container; widths of 16 and 12 go into whole rows only. Verifying takes seconds, so a few are."""
    if scheme == "mxfp4":
        message = refusal(folder, tmp_path / "out", "--scheme", scheme)
        assert "groups of 32: they do not divide the 16 columns" in message
        return
    rows = ("--group-size", 0) if SCHEMES[scheme].group_sizes else ()
    verified = scheme in ("w4a16", "w3a4")
    found = quantized(folder, tmp_path / "out", scheme, *rows, *([] if verified else ["--no-verify"]))
    assert found["container"] == SCHEMES[scheme].containers[0]
    assert len(found["layers"]) == 2
    assert ("verification" in found["checks"]) == verified
    if scheme == "w4a16":
        assert found["checks"]["verification"]["loaded_by"] == "transformers"
        assert found["checks"]["verification"]["logits"]["max_diff"] < 1e-2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", REPORT_FILE, "tokenizer.json"} <= files
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"moe quantize {folder / 'mixtral'} {tmp_path / 'out'} --scheme {scheme} --method gptq" in card
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["layers"] == found["layers"]


def test_the_command_of_the_card_makes_it_again(folder: Path, tmp_path: Path) -> None:
    """Bit by bit, apart from the name."""
    options = ("--method", "eaquant+gptq", "--group-size", 0, "--balance", 1.5, "--affinity", "--seed", 3)
    options += ("--no-verify",)
    quantized(folder, tmp_path / "out", "w4a8", *options, "--eval", folder / "text.txt", "--eval-windows", 2)
    card = (tmp_path / "out" / "README.md").read_text()
    match = re.search(r"```\nmoe quantize (.*)\n```", card)
    assert match
    words = match[1].replace(str(tmp_path / "out"), str(tmp_path / "again")).split(" ")
    assert run(*words, "--no-verify").exit_code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"README.md", REPORT_FILE}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_eaquant_whole(folder: Path, tmp_path: Path) -> None:
    """Balanced, and with perplexities before and after."""
    words = ("--method", "eaquant+gptq", "--group-size", 0, "--eval", folder / "text.txt", "--eval-windows", 2)
    found = quantized(folder, tmp_path / "out", "w4a4", *words, source="ours")
    assert found["container"] == "simulated"
    tokens = found["layers"][0]["tokens"]
    assert tokens["target"] == 256  # 2 K N / E = 2 * 2 * 256 / 4
    sums = [sum(parts) for parts in zip(tokens["routed"], tokens["reserve"], tokens["scored"], strict=True)]
    assert min(sums) == 256
    assert found["reserve_tokens"] > 0
    perplexity = found["checks"]["perplexity"]
    assert perplexity["before"] > 1
    assert perplexity["after"] != perplexity["before"]


def test_gguf(folder: Path, tmp_path: Path) -> None:
    """A file that llama.cpp runs, with the word of `moe export` for it as well."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    write_mixtral(folder / "wide", hidden_size=64, intermediate_size=32, head_dim=8)
    words = ("--group-size", 32, "--to", "gguf", "--method", "gptq")
    found = quantized(folder, tmp_path / "out.gguf", "w8a16", *words, source="wide")
    assert (found["container"], found["to"]) == ("gguf", "mixtral")
    assert found["checks"]["verification"]["logits"]["same_top1"] > 0.95
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf"}
    message = refusal(folder, tmp_path / "no.gguf", "--scheme", "w4a16", "--container", "gguf")
    assert "use --group-size 32" in message


def test_without_text_only_rounding_to_nearest(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "mixtral", tmp_path / "out", "--scheme", "fp8", "--method", "rtn", "--no-verify")
    assert done.exit_code == 0, done.output
    assert "never chosen" in done.stderr
    message = refusal(folder, tmp_path / "other", "--scheme", "fp8", "--method", "gptq", text=False)
    assert "--calibration is not given" in message


def test_refusals(folder: Path, tmp_path: Path) -> None:
    """Each names the field, its value, and what would do."""
    out = tmp_path / "out"
    w4 = ("--scheme", "w4a16", "--group-size", 0)
    assert "did you mean 'w4a16'?" in refusal(folder, out, "--scheme", "w4a61")
    assert "did you mean 'eaquant'?" in refusal(folder, out, *w4, "--method", "eaqant")
    assert "of 128: they do not divide the 16 columns of self_attn.q_proj; use --group-size 0" in refusal(
        folder, out, "--scheme", "w4a16"
    )
    message = refusal(folder, out, "--scheme", "w4a4", "--container", "compressed-tensors")
    assert "w4a4" in message
    assert "w8a8" in message
    assert "--container 'zip' is unknown" in refusal(folder, out, *w4, "--container", "zip")
    assert "--to 'gpt2' is unknown" in refusal(folder, out, *w4, "--to", "gpt2")
    assert "does not fit qwen3_moe" in refusal(folder, out, *w4, "--to", "qwen3_moe")
    assert "calibration text 1 has" in refusal(folder, out, *w4, "--tokens", 32000)
    assert "must be a multiple of --window" in refusal(folder, out, *w4, "--tokens", 100)
    assert "use --window 64" in refusal(folder, out, *w4, "--window", 128)
    assert "is not a text file" in refusal(folder, out, *w4, "--calibration", tmp_path / "gone.txt")
    (tmp_path / "taken").mkdir()
    assert "taken exists; remove it" in refusal(folder, tmp_path / "taken", *w4)


def test_a_quantised_source_is_refused(folder: Path, tmp_path: Path) -> None:
    quantized(folder, tmp_path / "once", "w8a16", "--no-verify")
    done = run(tmp_path / "once", tmp_path / "twice", "--scheme", "w4a16", "--calibration", folder / "text.txt")
    assert done.exit_code == 2
    assert "has quantized weights (compressed-tensors)" in re.sub(r"\s+", " ", done.output)
    assert ModelFolder(tmp_path / "once").config.quantization_config["quant_method"] == "compressed-tensors"


def test_routers_that_cannot_be_scaled(folder: Path, tmp_path: Path) -> None:
    """They are named before anything is computed; methods that scale nothing do."""
    write_model(folder / "relu", router={"name": "modified_softmax"})
    words = ("--scheme", "w4a4", "--group-size", 0)
    message = refusal(folder, tmp_path / "out", *words, "--method", "smoothquant", source="relu")
    assert "moe.router.name='modified_softmax' does not allow it" in message
    assert "use --method rtn or gptq" in message
    quantized(folder, tmp_path / "out", "w4a4", "--group-size", 0, source="relu")


def test_soft_routing_is_refused(folder: Path, tmp_path: Path) -> None:
    write_model(folder / "soft", router={"name": "mixture_of_tokens"})
    words = ("--scheme", "w4a4", "--group-size", 0, "--method", "rtn")
    assert "mixes tokens into slots" in refusal(folder, tmp_path / "out", *words, source="soft")
