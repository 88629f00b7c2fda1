"""`moe mup check` and `moe mup sweep` as users call them, on a tiny recipe."""

import json
from pathlib import Path

import pytest
from helpers.runs import write_recipe
from typer.testing import CliRunner, Result

from moe.cli import app

# The three lines that turn a recipe into a muP one.
MUP = """
parametrization:
  name: mup
  base: {hidden_size: 32, intermediate_size: 64, num_attention_heads: 2}
"""
CHECK = ("--widths", "32,64", "--steps", "2", "--seeds", "1")


def moe(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["mup", *arguments])


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("mup"), optim={"lr": 0.002})


@pytest.fixture(scope="module")
def recipe(standard: Path) -> Path:
    path = standard.with_name("mup.yaml")
    path.write_text(standard.read_text() + MUP.lstrip())
    return path


def test_check_prints_tables_draws_and_says_which_modules_fail(standard: Path, tmp_path: Path) -> None:
    picture = tmp_path / "check.png"
    result = moe(
        "check", str(standard), "--widths", "32,128", "--steps", "1", "--seeds", "1", "--picture", str(picture)
    )
    assert result.exit_code == 1 and result.stdout == "", "results for people go to stderr, and it failed"
    flat = " ".join(result.stderr.split())
    assert "activation after 1 step, standard parametrization, by width" in flat
    assert "fail: " in flat and "self_attn.o_proj" in flat.partition("fail: ")[2]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_check_prints_json(recipe: Path) -> None:
    """Three lines more: another parametrization, whose status says what its JSON says."""
    result = moe("check", str(recipe), *CHECK, "--windows", "8", "--json")
    found = json.loads(result.stdout)
    assert (found["parametrization"], found["values"]) == ("mup", [32, 64])
    assert result.exit_code == (0 if found["ok"] else 1)
    by_module = {(each["module"], each["quantity"], each["step"]): each["change"] for each in found["modules"]}
    plain = moe("check", str(recipe), "parametrization={name: standard}", *CHECK, "--windows", "8", "--json")
    for each in json.loads(plain.stdout)["modules"]:
        if each["module"] in ("self_attn.o_proj", "mlp.experts") and each["judged"]:
            assert each["change"] > by_module[each["module"], each["quantity"], each["step"]]


def test_check_of_another_axis_and_optimizer(recipe: Path) -> None:
    result = moe(
        "check", str(recipe), "optim.name=muon", "parallel.zero_stage=0", "--experts", "4,8", "--steps", "1", "--json"
    )
    assert json.loads(result.stdout)["axis"] == "experts", result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "64,a"], "--widths '64,a' must be whole numbers, such as 128,256,512"),
        (["--granularity", "1,1"], "--granularity 1,1 needs at least 2 different values, such as 1,2,4"),
        (
            ["--widths", "32,64", "--experts", "4,8"],
            "compare one thing at a time, not width and experts; run the command",
        ),
        (["--widths", "32,33"], "model.decoder.num_attention_heads=2 of width 32 is no whole number at width 33"),
        (["moe=null", "parallel.ep_size=1", "--experts", "4,8"], "moe is null: a dense recipe has no experts to vary"),
        (
            ["parametrization={name: mup}"],
            "parametrization.name=mup needs parametrization.base: the widths of the model",
        ),
        (
            ["parametrization={name: mup, base: {hidden_size: 32}}", "--widths", "32,64"],
            "parametrization.base lacks intermediate_size, num_attention_heads",
        ),
        (
            [
                "parametrization.base={hidden_size: 32, intermediate_size: 64, num_attention_head: 2}",
                "--widths",
                "32,64",
            ],
            "parametrization.base.num_attention_head is not a width; did you mean 'num_attention_heads'",
        ),
        (
            [
                "parametrization.base={hidden_size: 32, intermediate_size: 64, num_attention_heads: 3}",
                "--widths",
                "32,64",
            ],
            "makes no model: The hidden size (32) is not a multiple of the number of attention heads (3)",
        ),
        (["parametrization.name=standard"], "parametrization.base is for parametrization.name=mup; set that name, or"),
        (["optim.name=muon", "--experts", "4,8"], "optim.name=muon needs parallel.zero_stage=0, and it is 1"),
    ],
)
def test_mistakes_in_a_check(recipe: Path, arguments: list[str], message: str) -> None:
    result = moe("check", str(recipe), "--steps", "1", "--seeds", "1", *arguments)
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e-3,x,2e-3"], "--lr '1e-3,x,2e-3' must be numbers such as 1e-3,2e-3,4e-3"),
        (["--lr", "1e-3,2e-3"], "--lr needs at least three different positive learning rates, such as 1e-3,2e-3,4e-3"),
        (["--widths", "48", "--lr", "1,2,3", "model.init_from=x"], "model.init_from=x is a model of one shape"),
        (["--widths", "64", "--lr", "1,2,3", "data.eval_fraction=0"], "data.eval_fraction=0 holds nothing out"),
    ],
)
def test_mistakes_in_a_sweep(recipe: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = moe("sweep", str(recipe), str(tmp_path / "new"), *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "new").exists()


def test_sweep_of_finished_runs(recipe: Path, tmp_path: Path) -> None:
    """What is there is read; a diverged run is null in JSON, and no best rate."""
    folder, picture = tmp_path / "runs", tmp_path / "sweep.png"
    for value in (32, 64):
        for lr, loss in (("0.001", 3.0), ("0.002", 2.0), ("0.004", 3.0), ("0.008", None)):
            for seed in (0, 1):
                run = folder / f"width-{value}-lr-{lr}-seed-{seed}"
                run.mkdir(parents=True)
                (run / "summary.json").write_text(json.dumps({"eval_loss": loss}))
    arguments = ["sweep", str(recipe), str(folder), "--widths", "32,64", "--lr", "1e-3,2e-3,4e-3,8e-3"]
    result = moe(*arguments, "--json", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["shift"] == 1.0 and found["runs"][6]["eval_loss"] is None
    for optimum in found["optima"]:
        assert [optimum[key] for key in ("lr", "low", "high")] == pytest.approx([2e-3] * 3)
        assert not optimum["at_edge"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    people = moe(*arguments)
    assert (
        people.stdout == "" and "the best learning rate moves by a factor of 1.00 over width 32 to 64" in people.stderr
    )
