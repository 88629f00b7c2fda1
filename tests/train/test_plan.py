"""`moe plan` from a recipe: JSON, settings that fit the config, errors, and the picture."""

import json
from pathlib import Path

import pytest
from helpers.runs import write_recipe
from typer.testing import CliRunner

from moe.cli import app
from moe.train.config import load_config
from moe.train.plan import PlanOptions, chosen_hardware, model_shape, search_space

SMALL = ["--gpus", "4", "--gpus-per-node", "2", "--ep", "1,4", "--zero", "1,2", "--micro-batch", "1,2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("plan"))


def test_plan_prints_json_and_draws(recipe: Path) -> None:
    picture = recipe.parent / "replay.png"
    arguments = [
        "plan",
        str(recipe),
        *SMALL,
        "--json",
        "--trace",
        "uniform",
        "--trace",
        "zipf:1.0",
        "--picture",
        str(picture),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["kind"] == "predicted"
    assert plan["assumptions"]["flops"] == 989.5e12
    assert len(plan["candidates"]) == 2 * 2 * 2 * 2
    assert {(row["trace"], row["ep_size"]) for row in plan["replays"]} == {
        (trace, degree) for trace in ("uniform", "zipf:1.0") for degree in (2, 4)
    }
    assert picture.read_bytes().startswith(b"\x89PNG")
    best = load_config(recipe, [*plan["best"], "parallel.processes=4"])
    assert best.grad_accum(4) * best.train.micro_batch_size * 4 == best.train.batch_size


def test_settings_go_to_stdout_and_tables_to_stderr(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe), *SMALL])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("parallel.ep_size=") and result.stdout.count("\n") == 1
    assert "Predicted" in result.stderr and "Assumptions" in result.stderr


def test_nothing_fits_says_by_how_much_and_what_would_help(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe), *SMALL, "--memory", "3.01G"])
    assert result.exit_code == 2
    assert "nothing fits" in result.stderr and "GB too much" in result.stderr and ": use " in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "h1000"}, "--hardware 'h1000' is unknown"),
        ({"memory": "much"}, "--memory 'much' is no number"),
        ({"interconnect": "450G"}, "must read NODE/NETWORK"),
        ({"assume": ("matmul_eficiency=1",)}, "matmul_efficiency"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_hardware(PlanOptions(gpus=8, **options))  # type: ignore[arg-type]


def test_options_change_the_hardware() -> None:
    options = PlanOptions(
        gpus=8, hardware="a100", memory="40G", interconnect="300G/12.5G", assume=("latency=1e-5",), ep="2,4"
    )
    hardware = chosen_hardware(options)
    assert (hardware.memory_bytes, hardware.network_bandwidth, hardware.latency) == (40e9, 12.5e9, 1e-5)
    assert search_space(options).ep_sizes == (2, 4)
    with pytest.raises(ValueError, match="must name stages"):
        search_space(PlanOptions(gpus=8, zero="4"))


def test_what_cannot_be_planned_is_said(recipe: Path) -> None:
    config = load_config(recipe, ["data.tokenizer.path=somewhere"])
    with pytest.raises(ValueError, match=r"add model\.decoder\.vocab_size"):
        model_shape(config)
    result = CliRunner().invoke(app, ["plan", str(recipe), "parallel.offload_optimizer=cpu"])
    assert result.exit_code == 2 and "parallel.offload_optimizer=cpu cannot be planned" in result.stderr
