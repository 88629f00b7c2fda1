"""`moe tomoe` and `moe recover` as users run them, one after the other."""

import json
from pathlib import Path

import pytest
from convert.dense_source import write_source
from typer.testing import CliRunner, Result

from moe.cli import app


def moe(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_source(tmp_path_factory.mktemp("recover"))


def test_tomoe_then_recover(source: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = source
    made = moe(
        *("tomoe", dense, tmp_path / "masked", "--calibration", text, "--experts", 4, "--steps", 6, "--batch", 2),
        *("--tokens", 640, "--window", 32, "--width-multiple", 16, "--json"),
    )
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["width"] == 32
    assert found["active_share"] == 0.5
    assert "step 6:" in made.stderr
    trained = moe(
        *("recover", tmp_path / "masked", tmp_path / "out", "--text", text, "--steps", 8, "--window", 32, "--lr", 0.01),
        *("--distill", dense, "--eval-every", 4, "--eval-windows", 4, "--json"),
    )
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert result["after"] < 0.9 * result["before"]
    assert [point["step"] for point in result["points"] if point["held_out"] is not None] == [0, 4, 8]
    assert trained.stderr.count("held-out loss") == 3
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    evaluated = moe("eval", tmp_path / "out", "--text", text, "--window", 32, "--max-windows", 4, "--json")
    assert evaluated.exit_code == 0, evaluated.output


def test_mistakes(source: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = source
    refused = moe("recover", dense, tmp_path / "out", "--text", text, "--window", 32)
    assert refused.exit_code == 2
    assert "moe import" in refused.stderr
    refused = moe("recover", dense, tmp_path / "out", "--text", text, "--mode", "half")
    assert refused.exit_code == 2
    assert "recover.mode='half'" in refused.stderr
    refused = moe("tomoe", dense, tmp_path / "out", "--calibration", text, "--active", 1.5)
    assert refused.exit_code == 2
    assert "active_share=1.5" in refused.stderr
    assert not (tmp_path / "out").exists()
