"""`moe export` and `moe import`: what is printed, what is compared, and what users are told when they err."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from models.stock.stock_cases import GATED, TOP2, Case, logits, make_case, make_stock
from models.tiny import decoder_config, make_model, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from moe.cli import app
from moe.models.stock import FORMATS
from moe.models.stock.family import Names

TEXT = "the cat sat on the mat, and the dog sat on the cat; "


def moe(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of ours in bf16 with a scale that is folded, and a tokenizer."""
    scaled = {"router": {"name": "topk", "top_k": 2, "route_scale": 1.5}}
    model = make_case(Case("llama", "mixtral", scaled)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=48))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_export_is_verified_by_transformers_alone(folder: Path) -> None:
    text, out = folder.parent / "text.txt", folder.parent / "mixtral"
    text.write_text(TEXT * 30)
    done = moe("export", folder, out, "--to", "mixtral", "--verify-text", text, "--shard-gb", "1e-5", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["from"] == "moe" and found["to"] == "mixtral" and found["out"] == str(out)
    assert found["rewritten"] == ["moe.router.route_scale=1.5 is multiplied into the experts' down_proj"]
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 30)["input_ids"]  # carried over
    assert found["verified"]["tokens"] == min(len(ids) // 128, 4) * 128
    assert 0 < found["verified"]["max_diff"] < 5e-2 * found["verified"]["reference_rms"]
    assert "comparing logits" in done.stderr and "same most likely token" in found["summary"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert type(model).__name__ == "MixtralForCausalLM" and model.dtype == torch.bfloat16
    assert len(list(out.glob("*.safetensors"))) > 1


def test_a_wrong_export_is_an_error_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(FORMATS["mixtral"]), "names", Names(block="block_sparse_moe", gate="w3", up="w1", down="w2")
    )
    done = moe("export", folder, folder.parent / "out", "--to", "mixtral")
    assert done.exit_code == 2 and "does not compute what its source does" in done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    done = moe("export", folder, folder.parent / "out", "--to", "mixtral", "--no-verify")
    assert done.exit_code == 0 and "not compared with the source" in done.stderr


def test_export_and_import_return_the_model(tmp_path: Path) -> None:
    model = make_case(Case("qwen2", "qwen2_moe", TOP2 | GATED))
    model.save_pretrained(tmp_path / "ours")
    done = moe("export", tmp_path / "ours", tmp_path / "stock", "--to", "qwen2_moe", "--no-verify", "--json")
    assert json.loads(done.stdout)["verified"] is None
    assert moe("import", tmp_path / "stock", tmp_path / "back", "--no-verify").exit_code == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes(dtype: str, expected: torch.dtype, folder: Path) -> None:
    out = folder.parent / "out"
    assert moe("export", folder, out, "--to", "mixtral", "--dtype", dtype, "--no-verify").exit_code == 0
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {expected}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_import_is_verified(tmp_path: Path) -> None:
    stock = make_stock("olmoe", tmp_path / "stock")
    done = moe("import", tmp_path / "stock", tmp_path / "ours", "--json")
    found = json.loads(done.stdout)
    assert found["from"] == "olmoe" and found["to"] == "moe" and found["verified"]["share_far"] == 0
    ids_BL = tokens(1, 8)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ours, ids_BL), logits(stock, ids_BL), rtol=0, atol=1e-4)


def test_mistakes_are_said_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    decoder_config("llama").save_pretrained(tmp_path / "dense")
    save_file({"x": torch.ones(1)}, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "there").mkdir()
    make_model(router={"name": "hash"}).save_pretrained(tmp_path / "hash")
    out = tmp_path / "out"
    for arguments, message in (
        (("export", folder, out, "--to", "mixtrel"), "--to 'mixtrel' is unknown"),
        (("export", folder, out, "--to", "mixtral", "--dtype", "int8"), "--dtype 'int8' is unknown; use one of keep"),
        (("export", folder, out, "--to", "mixtral", "--verify-text", out), "is not a file"),
        (("export", folder, tmp_path / "there", "--to", "mixtral"), "there exists"),
        (("export", folder, out, "--to", "qwen3_moe"), "lacks norms of queries and keys"),
        (("export", tmp_path / "hash", out, "--to", "mixtral"), "moe.router.name='hash'"),
        (("export", tmp_path / "dense", out, "--to", "mixtral"), "model_type='llama', which is none of"),
        (("import", tmp_path / "dense", out), "`moe upcycle` or `moe carve`"),
        (("import", tmp_path / "nowhere", out), "has no config.json"),
    ):
        done = moe(*arguments)
        assert done.exit_code == 2 and message in done.stderr, (arguments, done.output)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_gguf(tmp_path: Path) -> None:
    make_case(Case("llama", "mixtral", TOP2)).save_pretrained(tmp_path / "ours")
    out = tmp_path / "out.gguf"
    done = moe("export", tmp_path / "ours", out, "--to", "gguf", "--dtype", "fp32", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["architecture"] == "llama" and found["num_bytes"] == out.stat().st_size
    assert found["out"] == str(out) and "path" not in found
    assert found["summary"] != "not compared with the source"


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_a_gguf_file_that_fails_its_check_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong byte in the last tensor, as a failing disk gives it: nothing under the final name, nor beside it."""
    from moe.models.gguf import verify

    make_case(Case("llama", "mixtral", TOP2)).save_pretrained(tmp_path / "ours")
    out, check = tmp_path / "out.gguf", verify.check_contents

    def damaged(source: Path, file: Path, dtype: str) -> int:
        assert not out.exists()
        with file.open("r+b") as written:
            written.seek(-4, 2)
            written.write(b"\x00\x00\x80\x3f")
        return check(source, file, dtype)

    monkeypatch.setattr(verify, "check_contents", damaged)
    refused = moe("export", tmp_path / "ours", out, "--to", "gguf", "--dtype", "fp32")
    assert refused.exit_code == 2 and "differs from the source's" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert moe("export", tmp_path / "ours", out, "--to", "gguf", "--no-verify", "--json").exit_code == 0
