"""Finished run folders as data for scaling laws: real runs, their counts, and what cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import Planned, run_many, write_recipe
from typer.testing import CliRunner

from moe.cli import app
from moe.layer import MoESpec
from moe.scaling.shape import ModelShape, decoder_config
from moe.train.law_runs import law_counts, read_runs
from moe.train.run_folder import SUMMARY_FILE

DECODER = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_counts_by_hand(tied: bool) -> None:
    spec = MoESpec(num_experts=8, granularity=4, num_shared_experts=1, router={"name": "topk", "top_k": 2})
    decoder = decoder_config({**DECODER, "tie_word_embeddings": tied})
    counts = law_counts(ModelShape(decoder=decoder, moe=spec, seq_len=1).build())
    attention, norms, expert, router = 2 * 4 * 32 * 32, 5 * 32, 3 * 32 * 16, 2 * 8 * 32
    embedding = 300 * 32 * (1 if tied else 2)
    blocks = attention + norms + 2 * expert * (8 + 1)
    assert counts == {
        "active": embedding + blocks - 2 * expert * (8 - 2),
        "active_blocks": blocks - 2 * expert * (8 - 2),
        "total_blocks": blocks,
        "total": embedding + blocks + router,
        "embedding": embedding,
        "routing": router,
    }


SIZES = {"s": (8, 16), "m": (16, 32), "l": (32, 64)}
LENGTHS = (8, 16, 32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine real runs: three sizes, three lengths; 4 experts of which a token uses 2."""
    folder = tmp_path_factory.mktemp("law")
    recipe = write_recipe(folder)
    planned = [
        Planned(
            name=f"{size}-{steps}",
            overrides=[
                f"model.decoder.hidden_size={width}",
                f"model.decoder.intermediate_size={hidden}",
                f"train.steps={steps}",
                "train.checkpoint_every=0",
                "parallel.ep_size=1",
                "parallel.zero_stage=0",
            ],
        )
        for size, (width, hidden) in SIZES.items()
        for steps in LENGTHS
    ]
    assert [result.status for result in run_many(recipe, planned, processes=1)] == [0] * 9
    return [folder / "runs" / run.name for run in planned]


@pytest.mark.slow
def test_a_law_of_real_runs(runs: list[Path], tmp_path: Path) -> None:
    found = read_runs(runs)
    assert [run.tokens for run in found] == [steps * 8 * 32 for _ in SIZES for steps in LENGTHS]
    assert len({run.active for run in found}) == len({run.total_blocks for run in found}) == 3
    assert {(run.expansion, run.granularity) for run in found} == {(2.0, 2.0)}
    for run, path in zip(found, runs, strict=True):
        summary = json.loads((path / SUMMARY_FILE).read_text())
        assert run.loss == summary["eval_loss"] and run.active < summary["active_params"] < summary["total_params"]
    law = tmp_path / "law.json"
    arguments = ["laws", "fit", *map(str, runs), "--samples", "50", "--out", str(law), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--picture", str(tmp_path / "law.png")])
    assert result.exit_code == 0, result.output
    fitted = json.loads(result.stdout)
    losses = [run.loss for run in found]
    # Losses of 8 to 32 steps fall faster than any power of tokens: the order comes out right, and the rest is said.
    assert np.corrcoef(np.argsort(np.argsort(losses)), np.argsort(np.argsort(fitted["predicted"])))[0, 1] > 0.8
    assert any("runs are off by more than 3%" in warning for warning in fitted["warnings"])
    assert fitted["left_out_rmse"] > 0.03 and len(fitted["left_out"]) == 9
    assert (tmp_path / "law.png").stat().st_size > 10_000
    result = CliRunner().invoke(
        app, ["laws", "predict", "--law", str(law), "--active", "50K", "--tokens", "20K", "--experts", "2",
              "--granularity", "2", "--vocab-size", "300", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert 0.5 * min(losses) < json.loads(result.stdout)[0]["loss"] < 1.5 * max(losses)


@pytest.mark.slow
def test_runs_that_cannot_be_compared_are_refused(runs: list[Path]) -> None:
    config, summary = runs[1] / "config.yaml", runs[1] / SUMMARY_FILE
    before = config.read_text(), summary.read_text()
    try:
        config.write_text(before[0].replace("seq_len: 32", "seq_len: 16"))
        with pytest.raises(ValueError, match=r"cannot be compared: data\.seq_len is 16 and 32"):
            read_runs(runs[:2])
        config.write_text(before[0])
        for key, value, message in (
            ("finished", False, "was stopped at step"),
            ("eval_loss", None, "has no held-out loss"),
        ):
            summary.write_text(json.dumps({**json.loads(before[1]), key: value}))
            with pytest.raises(ValueError, match=message):
                read_runs(runs[:2])
    finally:
        config.write_text(before[0])
        summary.write_text(before[1])
