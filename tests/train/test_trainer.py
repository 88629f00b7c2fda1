"""The trainer as its users meet it: `moe train` on a text, and what is in the run folder afterwards."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import (
    CHECKPOINT_EVERY,
    STEPS,
    Planned,
    Run,
    checkpoints,
    losses,
    newest_state,
    reference_run,
    run_many,
    run_moe,
    weights,
    write_recipe,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe.models  # noqa: F401  (registers our architecture)
from moe.train.config import RunConfig, load_config
from moe.train.data import build_data
from moe.train.metrics import read_metrics

VARIANT_STEPS = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


def held_out_loss(model_dir: Path, config: RunConfig) -> float:
    """By transformers alone, in fp32, on the windows that the trainer evaluates."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    windows = build_data(config.data).evaluation
    assert windows is not None
    total, count = 0.0, 0
    for index in range(min(config.train.eval_windows, windows.samples_per_epoch)):
        sample = windows.sample(index)
        labels_L = torch.from_numpy(sample.labels_L)
        with torch.no_grad():
            logits_LV = model(torch.from_numpy(sample.input_ids_L)[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits_LV.double(), labels_L, reduction="sum").item()
        count += len(labels_L)
    return total / count


# --- the reference run: 2 processes, expert parallel 2, ZeRO-1


def test_json_is_one_object_on_stdout_and_the_summary(reference: Run) -> None:
    assert json.loads(reference.ended.stdout) == reference.summary
    assert "held-out loss" in reference.ended.stderr


def test_summary(reference: Run) -> None:
    summary = reference.summary
    assert summary["finished"] is True
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * 8 * 32
    assert summary["skipped_steps"] == 0
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    assert summary["total_params"] == sum(tensor.numel() for tensor in weights(reference.dir).values())
    one_expert = 3 * 32 * 64
    assert summary["active_params"] == summary["total_params"] - 2 * 2 * one_expert, "2 layers, 2 of 4 experts idle"
    assert len(summary["sample"]) > len("alpha")


def test_every_step_has_a_line_with_all_fields_of_all_layers(reference: Run) -> None:
    records = reference.metrics.train
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    numbers = {"loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "aux_loss"}
    layer_numbers = {"max_violation", "dropped_fraction", "entropy", "logit_norm", "aux_loss"}
    for record in records:
        assert numbers <= record.keys()
        assert all(math.isfinite(record[key]) and record[key] > 0 for key in numbers - {"lr"})
        assert record["tokens"] == record["step"] * 8 * 32
        assert list(record["layers"]) == ["0", "1"]
        for layer in record["layers"].values():
            assert layer_numbers <= layer.keys()
            assert len(layer["load"]) == 4
            assert sum(layer["load"]) == pytest.approx(1)
            assert max(layer["load"]) * 4 - 1 == pytest.approx(layer["max_violation"], abs=1e-6)
            assert 0 < layer["entropy"] <= math.log(4) + 1e-6
            assert layer["dropped_fraction"] == 0
            assert layer["losses"]["switch"] == pytest.approx(layer["aux_loss"] / 0.01, rel=1e-5)


def test_learning_rate_follows_the_schedule(reference: Run) -> None:
    rates = [record["lr"] for record in reference.metrics.train]
    assert rates[:3] == [0.005, 0.01, 0.01]
    assert rates[-1] == pytest.approx(0.01 / (STEPS * 0.2))


def test_loss_falls(reference: Run) -> None:
    found = reference.losses
    assert found[1] == pytest.approx(math.log(300), abs=0.5), "an untrained model knows nothing"
    assert found[STEPS] < 0.6 * found[1]
    assert reference.summary["eval_loss"] < 0.6 * found[1]


def test_the_model_folder_is_the_model_that_was_evaluated(reference: Run) -> None:
    expected = held_out_loss(reference.dir / "model", load_config(reference.dir / "config.yaml"))
    assert reference.summary["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert reference.metrics.evals[-1]["loss"] == reference.summary["eval_loss"]


def test_the_tokenizer_lies_beside_the_model(reference: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference.dir / "model")
    assert tokenizer.decode(tokenizer("alpha beta")["input_ids"]) == "alpha beta"


def test_report_and_pictures(reference: Run) -> None:
    assert "<html" in (reference.dir / "report.html").read_text(encoding="utf-8")
    pictures = {path.stem: path.read_bytes() for path in (reference.dir / "pictures").glob("*.png")}
    assert {"loss", "expert_load", "balance"} <= pictures.keys()
    assert all(content.startswith(b"\x89PNG") and len(content) > 2000 for content in pictures.values())


def test_the_resolved_config_and_the_environment_are_recorded(reference: Run) -> None:
    written = load_config(reference.dir / "config.yaml")
    assert written == load_config(reference.recipe, ["train.sample_tokens=4"])
    environment = json.loads((reference.dir / "environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2 and environment["ep_size"] == 2 and environment["zero_stage"] == 1
    assert environment["packages"].keys() >= {"torch", "deepspeed", "transformers"}


def test_only_the_last_checkpoints_stay(reference: Run) -> None:
    names = [path.name for path in checkpoints(reference.dir)]
    assert names == [f"step-{step:08d}" for step in (STEPS - CHECKPOINT_EVERY, STEPS)]
    assert not list((reference.dir / "checkpoints").glob(".partial*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_in_the_same_folder_is_refused_and_changes_nothing(reference: Run) -> None:
    before = contents(reference.dir)
    ended = run_moe("train", str(reference.recipe), folder=reference.recipe.parent)
    assert ended.status == 2
    assert "already holds a run" in ended.stderr and "--resume" in ended.stderr
    assert ended.stdout == ""
    assert contents(reference.dir) == before


# --- variants of a short run, all in two processes


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of runs that are trained as their names say."""
    folder = tmp_path_factory.mktemp("variants")
    train = {"steps": VARIANT_STEPS, "batch_size": 8, "micro_batch_size": 4, "eval_windows": 10, "sample_tokens": 0}
    # A balance loss per sequence: one over the global batch sees it grow with each micro-batch.
    balance = {"aux_coef": 0.01, "aux_scope": "sequence"}
    moe_section = {"num_experts": 4, "router": {"name": "topk", "top_k": 2}, "balance": balance}
    recipe = write_recipe(folder, train=train, moe=moe_section)
    noaux = ["moe.router={name: noaux_tc, top_k: 2}", "moe.balance.bias_update_rate=0.01", "moe.balance.aux_coef=0"]
    runs = [
        Planned(name="base", overrides=[]),
        Planned(name="recomputed", overrides=["train.activation_checkpointing=true"]),
        Planned(name="accumulated", overrides=["train.micro_batch_size=2"]),
        Planned(name="in_document", overrides=["data.in_document_attention=true"]),
        Planned(name="bf16", overrides=["train.precision=bf16"]),
        Planned(name="bias", overrides=noaux),
        Planned(name="dense", overrides=["moe=null", "parallel.ep_size=1"]),
        Planned(name="continued", overrides=[f"model.init_from={folder}/runs/base/model", "optim.lr=1e-6"]),
    ]
    results = run_many(recipe, runs)
    assert [result.status for result in results] == [0] * len(runs), results
    yield folder / "runs"


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def test_activation_checkpointing_changes_no_loss(variants: Path) -> None:
    base, recomputed = losses(variants / "base"), losses(variants / "recomputed")
    assert recomputed == pytest.approx(base, rel=1e-6)
    ours, theirs = read_metrics(variants / "recomputed").train, read_metrics(variants / "base").train
    for record, expected in zip(ours, theirs, strict=True):
        for name, layer in record["layers"].items():
            assert layer["load"] == pytest.approx(expected["layers"][name]["load"]), "counted once, not twice"


def test_gradient_accumulation_changes_no_loss(variants: Path) -> None:
    assert losses(variants / "accumulated") == pytest.approx(losses(variants / "base"), rel=1e-5)
    assert summary(variants / "accumulated")["tokens"] == summary(variants / "base")["tokens"]


def test_attention_within_documents(variants: Path) -> None:
    found, base = losses(variants / "in_document"), losses(variants / "base")
    assert found[VARIANT_STEPS] < 0.8 * found[1]
    assert found[1] != base[1], "other attention, other losses"


def test_bf16(variants: Path) -> None:
    found, base = losses(variants / "bf16"), losses(variants / "base")
    assert found == pytest.approx(base, rel=0.03)
    assert found != base, "it did not run in bf16"
    exported = weights(variants / "bf16")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    config = load_config(variants / "bf16" / "config.yaml")
    assert summary(variants / "bf16")["eval_loss"] == pytest.approx(
        held_out_loss(variants / "bf16" / "model", config), rel=0.01
    )


def test_the_selection_bias_moves_and_is_saved_and_exported(variants: Path) -> None:
    name = "model.layers.0.mlp.router.bias_E"
    path = checkpoints(variants / "bias")[-1] / "rank-0000.safetensors"
    with safe_open(path, framework="pt") as file:
        saved_E = file.get_tensor(f"buffer/{name}")
    steps_E = saved_E / 0.01
    assert steps_E.abs().max() >= 1, "it moved"
    assert torch.allclose(steps_E, steps_E.round(), atol=1e-3), "in steps of its rate"
    assert torch.equal(weights(variants / "bias")[name], saved_E)
    model = AutoModelForCausalLM.from_pretrained(variants / "bias" / "model")
    assert torch.equal(model.get_buffer(name), saved_E)
    config = load_config(variants / "bias" / "config.yaml")
    assert summary(variants / "bias")["eval_loss"] == pytest.approx(
        held_out_loss(variants / "bias" / "model", config), rel=1e-6
    )


def test_a_dense_decoder_trains_too(variants: Path) -> None:
    found = losses(variants / "dense")
    assert found[VARIANT_STEPS] < 0.8 * found[1]
    assert all(record["layers"] == {} for record in read_metrics(variants / "dense").train)
    values = json.loads((variants / "dense" / "model" / "config.json").read_text(encoding="utf-8"))
    assert values["model_type"] == "llama"
    assert summary(variants / "dense")["active_params"] == summary(variants / "dense")["total_params"]
    config = load_config(variants / "dense" / "config.yaml")
    assert summary(variants / "dense")["eval_loss"] == pytest.approx(
        held_out_loss(variants / "dense" / "model", config), rel=1e-6
    )


def test_init_from_continues_from_a_saved_model(variants: Path) -> None:
    """At a learning rate of nearly nothing, the held-out loss is the saved model's."""
    assert summary(variants / "continued")["eval_loss"] == pytest.approx(
        summary(variants / "base")["eval_loss"], rel=1e-3
    )
    assert newest_state(variants / "continued")["model_config"]["model_type"] == "moe_decoder"


# --- layouts


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (2, 2, 0), (2, 2, 2), (2, 2, 3)])
def test_layouts_train_the_same_model(variants: Path, tmp_path: Path, layout: tuple[int, int, int]) -> None:
    """Processes, expert-parallel degree and ZeRO stage change the losses by rounding only."""
    processes, ep_size, zero_stage = layout
    base = yaml.safe_load((variants / "base" / "config.yaml").read_text(encoding="utf-8"))
    train = {**base["train"], "micro_batch_size": 8 // processes}
    recipe = write_recipe(tmp_path, data=base["data"], train=train, moe=base["moe"])
    overrides = [f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}"]
    (result,) = run_many(recipe, [Planned(name="run", overrides=overrides)], processes)
    assert result.status == 0, result.error
    assert losses(tmp_path / "runs" / "run") == pytest.approx(losses(variants / "base"), rel=1e-4)
    assert summary(tmp_path / "runs" / "run")["eval_loss"] == pytest.approx(
        summary(variants / "base")["eval_loss"], rel=1e-4
    )
