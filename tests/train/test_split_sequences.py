"""`parallel.sp_size` in a whole run: the same losses as with whole sequences, in training and evaluation."""

from pathlib import Path

import pytest
from helpers.runs import Planned, losses, run_many, write_recipe

from moe.train.metrics import read_metrics

STEPS = "train.steps=6"  # at a small rate: AdamW turns noise in small gradients into visible steps
LR = "optim.lr=0.0005"
# Router noise would be drawn for other tokens.
MOE = {"num_experts": 4, "router": {"name": "topk", "top_k": 2}}


def test_losses_of_split_sequences(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, moe=MOE)
    variants = {"plain": [], "documents": ["data.in_document_attention=true"]}
    runs = []
    for name, overrides in variants.items():
        runs.append(Planned(name=name, overrides=[STEPS, LR, *overrides]))
        runs.append(Planned(name=f"{name}-split", overrides=[STEPS, LR, "parallel.sp_size=2", *overrides]))
    runs.append(Planned(name="odd", overrides=[STEPS, LR, "parallel.sp_size=2", "data.seq_len=31"]))
    *results, odd = run_many(recipe, runs)
    assert [result.status for result in results] == [0] * 4, results
    assert odd.status == 2 and "data.seq_len=31 is not divisible by parallel.sp_size=2" in odd.error
    folder = recipe.parent / "runs"
    for name in variants:
        whole, split = losses(folder / name), losses(folder / f"{name}-split")
        assert split == pytest.approx(whole, rel=1e-4)
        evaluations = [read_metrics(folder / run).evals[-1]["loss"] for run in (name, f"{name}-split")]
        assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-4)
    assert losses(folder / "plain") != pytest.approx(losses(folder / "documents"), rel=1e-4)
