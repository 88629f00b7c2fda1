"""`moe eval` and `moe generate` on a saved model: what is printed where, and what users are told when they err."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.model_folder import TEXT, write_model
from typer.testing import CliRunner, Result

from moe.cli import app
from moe.models import MoEForCausalLM
from moe.models.evaluate import cut_windows, perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, trained on nothing, with a tokenizer trained on the text, and ``text.txt``."""
    path = tmp_path_factory.mktemp("commands")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    write_model(path / "model")
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for child processes; here it was read long ago
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def moe(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def expected_loss(folder: Path, window: int, max_windows: int | None) -> dict:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "model")(TEXT)["input_ids"]
    return perplexity(MoEForCausalLM.from_pretrained(folder / "model"), cut_windows(ids, window, max_windows))


def test_eval_prints_one_json_object_and_nothing_else(folder: Path) -> None:
    """The real process: imports of torch and transformers must not print to stdout either."""
    command = [sys.executable, "-m", "moe.cli", "eval", str(folder / "model"), "--text", str(folder / "text.txt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--window", "8", "--json"], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    expected = expected_loss(folder, 8, None)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-3)
    assert {key: found[key] for key in ("windows", "tokens", "window")} == {
        "windows": expected["windows"],
        "tokens": expected["tokens"],
        "window": 8,
    }
    assert (found["model"], found["text"]) == (str(folder / "model"), str(folder / "text.txt"))


def test_eval_for_people_is_on_stderr(folder: Path) -> None:
    options = ["--text", folder / "text.txt", "--window", 8, "--max-windows", 5, "--device", "cpu"]
    done = moe("eval", folder / "model", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert f"loss {expected_loss(folder, 8, 5)['loss']:.4f} over 35 tokens" in done.stderr


def test_generate(folder: Path) -> None:
    options = ["--prompt", "the cat", "--max-new-tokens", 6]
    plain = moe("generate", folder / "model", *options)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.startswith("the cat")
    assert len(plain.stdout) > len("the cat\n")
    found = json.loads(moe("generate", folder / "model", *options, "--json").stdout)
    assert found["prompt"] == "the cat"
    assert found["text"] + "\n" == plain.stdout
    first, again, other = (
        moe("generate", folder / "model", *options, "--temperature", 3, "--seed", seed).stdout for seed in (0, 0, 1)
    )
    assert first == again
    assert first not in (other, plain.stdout)


def test_missing_and_wrong_files(folder: Path) -> None:
    text = folder / "text.txt"
    (folder / "empty").mkdir(exist_ok=True)
    short = folder / "short.txt"
    short.write_text("a")
    for arguments, message in (
        (["eval", folder / "model", "--text", folder / "none.txt"], "none.txt' is not a file"),
        (["eval", folder / "none", "--text", text], "has no config.json"),
        (["eval", folder / "empty", "--text", text], "has no config.json"),
        (
            ["eval", folder / "model", "--text", text, "--window", 10_000],
            "--window 10000 is longer than the model's 64 positions",
        ),
        (["eval", folder / "model", "--text", short, "--window", 64], "less than one window of 64; lower --window"),
        (["generate", folder / "empty", "--prompt", "x"], "has no config.json"),
        (["generate", text, "--prompt", "x"], "has no config.json"),
        (["generate", folder / "model", "--prompt", ""], "prompt='' has no tokens"),
        (["eval", "no/such-model", "--text", text], "'no/such-model' cannot be loaded"),
    ):
        done = moe(*arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        assert message in done.stderr.replace("\n", " "), arguments
        assert done.stdout == ""


def test_a_wrong_config_is_a_users_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe"]["num_expert"] = config["moe"].pop("num_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = moe("generate", tmp_path, "--prompt", "x")
    assert done.exit_code == 2
    assert "moe.num_expert is not an option; did you mean 'num_experts'?" in done.stderr


def test_options_out_of_range(folder: Path) -> None:
    for arguments in (
        ["eval", folder / "model", "--text", folder / "text.txt", "--window", 1],
        ["generate", folder / "model", "--prompt", "x", "--max-new-tokens", 0],
        ["generate", folder / "model", "--prompt", "x", "--temperature", -1],
        ["generate", folder / "model"],
    ):
        assert moe(*arguments).exit_code == 2


@pytest.mark.parametrize("command", [info.name or info.callback.__name__ for info in app.registered_commands])
def test_help_has_an_example(command: str) -> None:
    done = moe(command, "--help")
    assert done.exit_code == 0
    assert f"Example: moe {command}" in " ".join(done.stdout.split())


def test_all_commands_are_listed() -> None:
    done = moe("--help")
    for command in ("train", "eval", "generate", "report", "doctor"):
        assert command in done.stdout
