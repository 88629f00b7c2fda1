"""Whole runs under muP, and with Muon, on two processes: resumed to the last bit, and what a checkpoint refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import Planned, Result, assert_same_run, newest_state, run_many, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

import moe.models  # noqa: F401  (registers our architecture)
from moe.scaling.mup import width_factors
from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow  # fourteen runs of two processes

BASE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1}
MUP = "parametrization={name: mup, base: {hidden_size: 16, intermediate_size: 32, num_attention_heads: 1}}"
OTHER = MUP.replace("hidden_size: 16", "hidden_size: 8")
MUON = ["optim.name=muon", "parallel.zero_stage=0"]
KINDS = {"mup": [MUP], "muon": [MUP, *MUON], "muon_bf16": [MUP, *MUON, "train.precision=bf16"]}


def runs(folder: Path) -> list[Planned]:
    found = []
    for kind, settings in KINDS.items():
        found += [
            Planned(name=f"{kind}-whole", overrides=settings),
            Planned(name=f"{kind}-halves", overrides=[*settings, "train.steps=4"]),
            Planned(name=f"{kind}-halves", overrides=settings, resume=True),
        ]
    model = f"model.init_from={folder / 'runs' / 'mup-whole' / 'model'}"
    return [
        *found,
        Planned(name="mup-whole", overrides=[OTHER, "train.steps=9"], resume=True),
        Planned(name="mup-whole", overrides=["train.steps=9"], resume=True),
        Planned(name="muon-whole", overrides=[MUP, "parallel.zero_stage=0", "train.steps=9"], resume=True),
        Planned(name="again", overrides=[model, "moe=null"]),
        Planned(name="again-other", overrides=[model, "moe=null", OTHER]),
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"steps": 8, "checkpoint_every": 4, "eval_windows": 4}
    optim = {
        "lr": 5e-3,
        "warmup_steps": 2,
        "schedule": "constant",
    }  # so that a run of half the steps begins the same way
    moe = {"num_experts": 4, "router": {"name": "topk", "top_k": 2, "jitter": 0.05}}
    return write_recipe(tmp_path_factory.mktemp("mup"), train=train, optim=optim, moe=moe)


@pytest.fixture(scope="module")
def results(recipe: Path) -> list[Result]:
    return run_many(recipe, runs(recipe.parent))


def of(recipe: Path, name: str) -> Path:
    return recipe.parent / "runs" / name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(recipe: Path, results: list[Result], kind: str) -> None:
    index = 3 * list(KINDS).index(kind)
    assert [result.status for result in results[index : index + 3]] == [0, 0, 0], results[index + 2].stderr[-2000:]
    assert any("resumed from step 4" in event["message"] for event in read_metrics(of(recipe, f"{kind}-halves")).events)
    assert_same_run(of(recipe, f"{kind}-halves"), of(recipe, f"{kind}-whole"))
    losses = [record["loss"] for record in read_metrics(of(recipe, f"{kind}-whole")).train]
    assert losses[-1] < losses[0] - 0.3


def test_the_base_stands_in_the_checkpoint_and_in_the_model(recipe: Path, results: list[Result]) -> None:
    assert newest_state(of(recipe, "mup-whole"))["model_config"]["mup"] == BASE
    folder = of(recipe, "mup-whole") / "model"
    assert json.loads((folder / "config.json").read_text())["mup"] == BASE
    assert AutoConfig.from_pretrained(folder).mup == BASE
    factors = width_factors(AutoModelForCausalLM.from_pretrained(folder))
    assert factors["model.layers.0.mlp.experts.down_proj"].lr == 0.5


def refusal(result: Result) -> str:
    assert result.status == 2, result.stderr[-2000:]
    return result.error


def test_another_base_is_refused(results: list[Result]) -> None:
    other, standard = refusal(results[9]), refusal(results[10])
    assert "is a checkpoint of another model: mup.hidden_size is 16 there and 8 here; resume with the config" in other
    assert "is a checkpoint of another model: mup" in standard and "resume with the config that wrote it" in standard


def test_another_optimizer_is_refused(results: list[Result]) -> None:
    assert "was written by another optimizer" in refusal(results[11])


def test_a_loaded_model_trains_on_as_it_was_made(recipe: Path, results: list[Result]) -> None:
    assert results[12].status == 0, results[12].stderr[-2000:]
    folder = of(recipe, "again") / "model"
    assert json.loads((folder / "config.json").read_text())["mup"] == BASE
    first, last = (AutoModelForCausalLM.from_pretrained(of(recipe, name) / "model") for name in ("mup-whole", "again"))
    moved = {name: (last.get_parameter(name) - weight).abs().max() for name, weight in first.named_parameters()}
    # By AdamW at most about the rate in each of 8 steps (2 of warm-up), which is half of the recipe's for a matrix.
    assert 0 < moved["model.layers.0.mlp.experts.down_proj"] < 0.5 * 8 * 5e-3 < moved["model.embed_tokens.weight"]
    assert "was made with parametrization.base=" in refusal(results[13])
    assert "remove parametrization: the model's own is used" in refusal(results[13])


def test_muon_moved_all_singular_values(recipe: Path, results: list[Result]) -> None:
    """Between the same start and the end: the sum of near-orthogonal updates has no small ones; AdamW's is of low rank."""

    def spectrum(name: str) -> Any:
        end = AutoModelForCausalLM.from_pretrained(of(recipe, name) / "model").get_parameter(weight)
        return torch.linalg.svdvals((end - start.get_parameter(weight)).detach().float())

    weight = "model.layers.1.self_attn.o_proj.weight"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(of(recipe, "mup-whole") / "model")
    start = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    muon, adamw = (spectrum(name) for name in ("muon-whole", "mup-whole"))
    flatness = [float(values.median() / values.max()) for values in (muon, adamw)]
    assert flatness[0] > 2 * flatness[1], flatness
