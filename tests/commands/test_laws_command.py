"""`moe laws` and `moe plan --budget` as users call them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moe.cli import app
from moe.scaling.laws import LAWS
from moe.scaling.laws.forms import FORMS, Trained


def moe(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty runs whose losses follow a known law with noise of 0.1 %."""
    rng = np.random.default_rng(0)
    params, tokens = (np.exp(rng.uniform(np.log(low), np.log(100 * low), 20)) for low in (3e7, 5e8))
    runs = Trained(params=params, tokens=tokens, expansion=np.ones(20), granularity=np.ones(20))
    losses = FORMS["chinchilla"].loss(LAWS["fine-grained-dense"].constants, runs) * np.exp(
        1e-3 * rng.standard_normal(20)
    )
    path = tmp_path_factory.mktemp("laws") / "runs.csv"
    lines = ["name,active,total_blocks,tokens,expansion,granularity,loss"]
    lines += [f"r{i},{n},{n},{d},1,1,{loss}" for i, (n, d, loss) in enumerate(zip(params, tokens, losses, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_fit_prints_json_writes_the_law_and_draws(table: Path, tmp_path: Path) -> None:
    law, picture = tmp_path / "law.json", tmp_path / "law.png"
    arguments = ("--samples", "50", "--out", str(law), "--picture", str(picture), "--json")
    result = moe("laws", "fit", str(table), *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(law.read_text())
    interval = found["intervals"]["alpha"]
    assert interval["low"] < found["constants"]["alpha"] < interval["high"]
    assert found["left_out_rmse"] < 0.003 and len(found["runs"]) == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    predicted = moe("laws", "predict", "--law", str(law), "--active", "300M", "--tokens", "5B", "--json")
    assert predicted.exit_code == 0, predicted.output
    row = json.loads(predicted.stdout)[0]
    dense, constants = FORMS["chinchilla"], LAWS["fine-grained-dense"].constants
    one = np.ones(1)
    exact = dense.loss(constants, Trained(params=3e8 * one, tokens=5e9 * one, expansion=one, granularity=one))[0]
    assert row["loss"] == pytest.approx(exact, rel=2e-3) and row["extrapolations"] == []
    planned = moe("plan", "--budget", "1e19", "--law", str(law), "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["law"] == "own"


def test_fit_for_people_goes_to_stderr(table: Path) -> None:
    result = moe("laws", "fit", str(table), "--hold", "c=0.47", "--samples", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and "held" in result.stderr and "on a run left out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--form", "chinchila"), "--form 'chinchila' is unknown; did you mean 'chinchilla'?"),
        (("--hold", "c"), "--hold 'c' must read NAME=VALUE"),
        (("--form", "joint"), "do not determine"),
    ],
)
def test_fit_names_mistakes(table: Path, arguments: tuple[str, ...], message: str) -> None:
    result = moe("laws", "fit", str(table), *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_fit_names_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = moe("laws", "fit", str(tmp_path))
    assert result.exit_code == 2 and "is no folder of a finished run (summary.json is missing)" in result.stderr


def test_predict_gives_the_papers_row_and_says_who_cannot() -> None:
    result = moe(
        *("laws", "predict", "--active", "1B", "--non-embedding", "--tokens", "28.94B"),
        *("--experts", "64", "--granularity", "16", "--json"),
    )
    assert result.exit_code == 0, result.output
    found = {row["law"]: row for row in json.loads(result.stdout)}
    assert found["fine-grained"]["loss"] == pytest.approx(2.491, abs=0.025)
    assert found["fine-grained"]["flops"] == pytest.approx(1.93e20, rel=0.005)
    assert found["joint"]["loss"] is None and "granularity 1" in found["joint"]["reason"]
    said = moe("laws", "predict", "--active", "1B", "--tokens", "17B", "--experts", "8", "--law", "joint")
    assert said.exit_code == 0 and "joint: loss 2.5" in said.stderr
    wrong = moe("laws", "predict", "--active", "a lot", "--tokens", "17B")
    assert wrong.exit_code == 2 and "--active 'a lot' is no positive number" in wrong.stderr


def test_plan_takes_a_config_or_a_budget(tmp_path: Path) -> None:
    for arguments in ((), ("recipe.yaml", "--budget", "1e20")):
        result = moe("plan", *arguments)
        assert result.exit_code == 2 and "give either CONFIG" in result.stderr
    result = moe("plan", "recipe.yaml", "--max-params", "3B")
    assert result.exit_code == 2 and "--max-params 3B goes with --budget" in result.stderr
    result = moe("plan", "--budget", "1e20", "--law", "fine-grained", "--max-experts", "8")
    assert result.exit_code == 2 and "keeps to the limits" in result.stderr


def test_a_planned_budget_can_be_planned_on_gpus(tmp_path: Path) -> None:
    recipe = tmp_path / "optimal.yaml"
    result = moe("plan", "--budget", "3e17", "--max-experts", "4", "--write", str(recipe))
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and "what is built" in result.stderr and str(recipe) in result.stderr
    layout = ("--gpus", "2", "--ep", "2", "--zero", "1", "--micro-batch", "4")
    result = moe("plan", str(recipe), *layout, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["best"] is not None
