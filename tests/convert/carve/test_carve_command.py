"""`moe carve` and the engine behind it: folders that load, exactness, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.upcycle.sources import VOCAB, load, logits, save_dense, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moe.cli import app
from moe.convert.carve import CARVERS
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import carve
from moe.convert.carve.types import CarveShape
from moe.models import MoEForCausalLM
from moe.models.folder import ModelFolder
from moe.models.modeling import moe_layers

WIDTH = 64  # experts of 8: transformers' grouped matmul wants rows of 16 bytes
SHAPE = CarveShape(num_experts=8, num_shared=2, top_k=3)
ALL = CarveShape(num_experts=8, num_shared=2, top_k=6)
WINDOWS = tokens(6, 32)


def dense(folder: Path, kind: str = "llama", **values: Any) -> ModelFolder:
    return ModelFolder(save_dense(folder / "dense", kind, intermediate_size=WIDTH, **values))


def save_tokenizer(folder: Path) -> None:
    """Letters are tokens."""
    vocabulary = {chr(33 + index): index for index in range(VOCAB - 1)} | {" ": VOCAB - 1}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="!").save_pretrained(folder)


def write_text(path: Path, seed: int = 0, length: int = 4000) -> Path:
    letters = torch.randint(60, (length,), generator=torch.Generator().manual_seed(seed)) + 40
    lines = "".join(chr(code) for code in letters.tolist())
    path.write_text("\n".join(lines[start : start + 50] for start in range(0, length, 50)))
    return path


@pytest.mark.parametrize("method", CARVERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_with_every_expert_the_model_is_the_dense_one(kind: str, method: str, tmp_path: Path) -> None:
    """Saved, loaded, and saved and loaded again; refitted, since there is nothing to refit."""
    source = dense(tmp_path, kind)
    carved = carve(source, tmp_path / "carved", WINDOWS, CarveOptions(shape=ALL, method=method), check_BL=WINDOWS)
    assert carved.comparison.max_diff < 1e-4
    ids, expected = tokens(3, 20, seed=8), logits(load(source.path), tokens(3, 20, seed=8))
    model = load(tmp_path / "carved")
    assert isinstance(model, MoEForCausalLM)
    model.save_pretrained(tmp_path / "again")
    for folder in ("carved", "again"):
        torch.testing.assert_close(logits(load(tmp_path / folder), ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", CARVERS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_in_glm4_moe(kind: str, method: str, tmp_path: Path) -> None:
    """With every expert the dense model; with some, what our own format computes."""
    source, ids = dense(tmp_path, kind), tokens(3, 20, seed=8)
    everything = CarveOptions(shape=ALL, method=method, gate="ridge")
    carve(source, tmp_path / "all", WINDOWS, everything, to="glm4_moe")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "all", output_loading_info=True)
    assert model.config.model_type == "glm4_moe"
    assert not any(report.values()), report
    torch.testing.assert_close(logits(model.eval(), ids), logits(load(source.path), ids), atol=1e-5, rtol=1e-5)
    some = CarveOptions(shape=SHAPE, method=method, gate="ridge")
    for to in ("moe", "glm4_moe"):
        carve(source, tmp_path / to, WINDOWS, some, to=to)
    torch.testing.assert_close(
        logits(load(tmp_path / "glm4_moe"), ids), logits(load(tmp_path / "moe"), ids), atol=1e-4, rtol=1e-4
    )


def test_fewer_neurons_run_and_every_expert_is_used(tmp_path: Path) -> None:
    source = dense(tmp_path)
    reports = []
    options = CarveOptions(shape=SHAPE, method="cmoe", gate="ridge")
    carved = carve(source, tmp_path / "carved", WINDOWS, options, check_BL=WINDOWS, report=reports.append)
    assert [report.layer for report in reports] == [0, 1, 2]
    assert reports == carved.layers
    assert all(0 < report.quality.energy_kept < 1 for report in reports)
    assert carved.comparison.max_diff > 0.01
    model, counts = load(tmp_path / "carved"), []
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(lambda module, inputs, routing: counts.append(routing.counts_E))
        assert layer.experts.down_proj.shape == (6, 32, 8)
        assert layer.shared_experts.down_proj.weight.shape == (32, 16)
    logits(model, WINDOWS)
    assert len(counts) == 3
    for counts_E in counts:
        assert counts_E.sum() == WINDOWS.numel() * 3
        assert (counts_E > 0).all()


def test_refit_brings_the_carved_model_nearer(tmp_path: Path) -> None:
    source, found = dense(tmp_path), {}
    for refit in (False, True):
        options = CarveOptions(shape=SHAPE, method="weaver", refit=refit)
        found[refit] = carve(source, tmp_path / str(refit), WINDOWS, options, check_BL=WINDOWS).comparison.kl
    assert found[True] < 0.8 * found[False]


def test_sequential_calibration_changes_what_upper_layers_see(tmp_path: Path) -> None:
    source, weights = dense(tmp_path), {}
    for sequential in (False, True):
        options = CarveOptions(shape=SHAPE, method="cmoe", sequential=sequential)
        carve(source, tmp_path / str(sequential), WINDOWS, options)
        layers = moe_layers(load(tmp_path / str(sequential)))
        weights[sequential] = [layer.experts.down_proj for layer in layers.values()]
    assert torch.equal(weights[False][0], weights[True][0])
    assert not torch.allclose(weights[False][1], weights[True][1], atol=1e-3)


def test_a_bf16_source_stays_bf16(tmp_path: Path) -> None:
    source = ModelFolder(save_dense(tmp_path / "dense", dtype=torch.bfloat16, intermediate_size=WIDTH))
    carve(source, tmp_path / "carved", WINDOWS, CarveOptions(shape=SHAPE, method="static"), check_BL=WINDOWS)
    written = ModelFolder(tmp_path / "carved")
    dtypes = {name: written.read(name).dtype for name in written.names}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("bias_E")} == {torch.bfloat16}


def test_refusals(tmp_path: Path) -> None:
    source, out = dense(tmp_path), tmp_path / "out"
    cases = {
        r"--method 'cmeo' is unknown; did you mean 'cmoe'": {"method": "cmeo", "shape": SHAPE},
        r"--experts 5 does not divide the FFN width 64": {
            "method": "cmoe",
            "shape": CarveShape(num_experts=5, num_shared=1, top_k=2),
        },
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            carve(source, out, WINDOWS, CarveOptions(**options))
    with pytest.raises(ValueError, match="--to glm4_moe cannot hold the gate of --method cmoe; add --gate ridge"):
        carve(source, out, WINDOWS, CarveOptions(method="cmoe", shape=SHAPE), to="glm4_moe")
    out.mkdir()
    with pytest.raises(ValueError, match="exists; remove it"):
        carve(source, out, WINDOWS, CarveOptions(method="cmoe", shape=SHAPE))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"], "something was left behind"


def command(folder: Path, *more: str) -> Any:
    arguments = ["carve", str(folder / "dense"), str(folder / "carved"), "--tokens", "640", "--window", "64", *more]
    return CliRunner().invoke(app, arguments)


def test_command(tmp_path: Path) -> None:
    """Two texts, one of which evaluates as well; a card, a tokenizer, perplexities."""
    save_tokenizer(dense(tmp_path).path)
    first, second = write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt", seed=1)
    more = ["--calibration", str(first), "--calibration", str(second), "--eval", str(first), "--eval-windows", "3"]
    shape = ["--experts", "8", "--shared", "2", "--top-k", "4", "--gate", "ridge", "--to", "glm4_moe"]
    result = command(tmp_path, *more, *shape, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["active_share"] == 0.75
    assert len(found["layers"]) == 3
    assert found["dense_perplexity"] > 1
    assert found["perplexity"] > 1
    assert found["comparison"]["kl"] > 0
    assert "layer 3 of 3: " in result.stderr
    card = (tmp_path / "carved" / "README.md").read_text()
    assert "what the output loses" in card
    assert f"--eval {first}" in card
    assert (tmp_path / "carved" / "tokenizer.json").is_file()
    load(tmp_path / "carved")
    again = command(tmp_path, *more)
    assert again.exit_code == 2
    assert "exists; remove it" in again.stderr


def test_the_evaluated_part_of_a_file_does_not_calibrate(tmp_path: Path) -> None:
    """With the last fifth held out there are 3,264 tokens, lines and all."""
    save_tokenizer(dense(tmp_path).path)
    text = write_text(tmp_path / "a.txt")
    whole = command(tmp_path, "--calibration", str(text), "--tokens", "4032", "--no-verify")
    assert whole.exit_code == 0, whole.stderr
    split = command(tmp_path, "--calibration", str(text), "--tokens", "4032", "--eval", str(text))
    assert split.exit_code == 2
    assert "calibration text 1 has 3264 tokens, and 4032 of it are wanted" in split.stderr.replace("\n", " ")


def test_carve_and_recover(tmp_path: Path) -> None:
    """The training ends in the format asked for, nothing of the steps between is left, and the card tells of both."""
    save_tokenizer(dense(tmp_path).path)
    text = write_text(tmp_path / "a.txt")
    shape = [
        "--experts",
        "8",
        "--shared",
        "2",
        "--top-k",
        "2",
        "--method",
        "llama-moe",
        "--no-refit",
        "--to",
        "glm4_moe",
    ]
    result = command(tmp_path, "--calibration", str(text), *shape, "--recover-steps", "12")
    assert result.exit_code == 0, result.stderr
    assert "recovery step 10 of 12: loss " in result.stderr
    before, after = re.search(r"held-out perplexity ([\d.]+) -> ([\d.]+)", result.stderr).groups()
    assert float(after) < float(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "carved", "dense"]
    assert load(tmp_path / "carved").config.model_type == "glm4_moe"
    card = (tmp_path / "carved" / "README.md").read_text()
    assert "--recover-steps 12" in card
    assert "## Recovery training" in card


def test_tomoe_is_pointed_to(tmp_path: Path) -> None:
    save_tokenizer(dense(tmp_path).path)
    text = write_text(tmp_path / "a.txt")
    result = command(tmp_path, "--calibration", str(text), "--method", "tomoe")
    assert result.exit_code == 2
    assert "moe tomoe" in result.stderr.replace("\n", " ")


def test_command_errors(tmp_path: Path) -> None:
    source = dense(tmp_path)
    text = write_text(tmp_path / "a.txt", length=300)
    result = command(tmp_path, "--calibration", str(text))
    assert result.exit_code == 2
    assert "has no tokenizer that can be read" in result.stderr.replace("\n", " ")
    save_tokenizer(source.path)
    result = command(tmp_path, "--calibration", str(text))
    assert result.exit_code == 2
    assert "give more text or --tokens" in result.stderr
    result = command(tmp_path, "--calibration", str(tmp_path / "gone.txt"))
    assert "gone.txt' is not a text file" in result.stderr
    assert not (tmp_path / "carved").exists()
