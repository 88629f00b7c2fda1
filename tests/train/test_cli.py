"""The `moe` command: what it prints where, and its exit status for wrong input."""

import json
from pathlib import Path

import pytest
from helpers.runs import Run, reference_run, run_moe, write_recipe
from typer.testing import CliRunner

from moe.cli import app


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("cli"))


def test_too_few_devices(recipe: Path) -> None:
    """Through the real command, as the error must come before any process is started."""
    settings = ["parallel.device=cuda", "parallel.processes=512", "name=cuda"]
    ended = run_moe("train", str(recipe), *settings, "--json", folder=recipe.parent)
    assert ended.status == 2
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line]
    assert line.startswith("error: parallel.device=cuda needs one GPU for each of the 512 processes")
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "RECIPE", "train.stps=3"], ["train.stps", "'steps'"]),
        (["train", "RECIPE", "moe.router.top_k=5"], ["router.top_k=5", "num_experts=4"]),
        (["train", "RECIPE", "train.batch_size=9"], ["train.batch_size=9", "multiple of 8"]),
        (["train", "RECIPE", "parallel.ep_size=3"], ["moe.num_experts=4", "parallel.ep_size=3"]),
        (["train", "absent.yaml"], ["absent.yaml", "does not exist"]),
        (["report", "absent"], ["absent", "does not exist"]),
        (["eval", "absent/x/y", "--text", "absent.txt"], ["absent.txt", "is not a file"]),
        (["eval", "absent/x/y", "--text", "RECIPE"], ["absent/x/y", "config.json"]),
        (["generate", "absent/x/y", "--prompt", "a"], ["absent/x/y", "config.json"]),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_message(recipe: Path, arguments: list[str], parts: list[str]) -> None:
    arguments = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert all(part in result.stderr for part in parts), result.stderr
    assert not (recipe.parent / "runs").exists()


def test_report_again(reference: Run) -> None:
    page = reference.dir / "report.html"
    result = CliRunner().invoke(app, ["report", str(reference.dir), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": str(page), "pictures": str(reference.dir / "pictures")}
    assert page.stat().st_size > 1000


def test_eval_and_generate_read_the_model_folder(reference: Run, tmp_path: Path) -> None:
    model = str(reference.dir / "model")
    text = tmp_path / "new.txt"
    text.write_text("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda.\n" * 40, encoding="utf-8")
    arguments = ["eval", model, "--text", str(text), "--window", "32", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["loss"] < 4, "far below log(300) = 5.7: it was trained on such text"
    assert found["windows"] > 0 and found["tokens"] == found["windows"] * 31
    arguments = ["generate", model, "--prompt", "alpha beta", "--max-new-tokens", "8", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["prompt"] == "alpha beta"
    assert found["text"].startswith("alpha beta") and len(found["text"]) > len("alpha beta")
