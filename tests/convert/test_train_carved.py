"""Carved models under the trainer: two processes, expert-parallel and ZeRO, from ``model.init_from``."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert.dense_source import write_source
from helpers.runs import Planned, losses, run_many, weights, write_recipe

from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import carve
from moe.convert.carve.types import CarveShape
from moe.convert.tomoe import ToMoEOptions, tomoe_convert
from moe.models.calibration_text import read_windows
from moe.models.folder import ModelFolder

STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``carved`` and ``tomoe``, and of runs from them."""
    folder = tmp_path_factory.mktemp("carved")
    dense, text = write_source(folder)
    windows = read_windows(dense, [text], 640, 32).calibration_BL
    shape = CarveShape(num_experts=8, num_shared=2, top_k=3)  # 6 routed experts, 3 on each rank
    options = CarveOptions(shape=shape, method="weaver", gate="ridge")
    carve(ModelFolder(dense), folder / "carved", windows, options)
    tomoe_convert(
        dense, folder / "tomoe", windows, ToMoEOptions(num_experts=4, active_share=0.6, steps=2, width_multiple=8)
    )
    train = {"steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "eval_windows": 4, "checkpoint_every": 0}
    recipe = write_recipe(folder, train=train, optim={"lr": 1e-3, "warmup_steps": 1, "freeze_routers": True})
    tokenizer = f"data.tokenizer.path={dense}"

    def planned(name: str, source: str, *overrides: str) -> Planned:
        return Planned(name=name, overrides=[f"model.init_from={folder / source}", tokenizer, *overrides])

    zero3 = ["parallel.ep_size=1", "parallel.zero_stage=3"]
    plans = [
        planned("ep2-zero1", "carved"),
        planned("zero3", "tomoe", *zero3),
        replace(planned("zero3", "tomoe", *zero3, f"train.steps={STEPS + 1}"), resume=True),
    ]
    results = run_many(recipe, plans)
    assert [result.status for result in results] == [0] * len(plans), results
    return folder


def source_weights(folder: Path) -> dict[str, torch.Tensor]:
    source = ModelFolder(folder)
    return {name: source.read(name) for name in source.names}


@pytest.mark.parametrize(("run", "source"), [("ep2-zero1", "carved"), ("zero3", "tomoe")])
def test_everything_but_the_routers_is_trained_and_exported(runs: Path, run: str, source: str) -> None:
    before, after = source_weights(runs / source), weights(runs / "runs" / run)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".router." in name), name
    config = json.loads((runs / "runs" / run / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["moe"] == json.loads((runs / source / "config.json").read_text(encoding="utf-8"))["moe"]


def test_losses_fall_and_a_resumed_run_goes_on(runs: Path) -> None:
    """Weights that are not trained are in checkpoints too, at ZeRO 3 in pieces on all ranks."""
    found = losses(runs / "runs" / "ep2-zero1")
    assert found[STEPS] < found[1]
    found = losses(runs / "runs" / "zero3")
    assert list(found) == [1, 2, 3, 4]
    assert found[4] < found[3] < found[1]
