"""transformers' own `Trainer`, unmodified: it learns, balances, accumulates, checkpoints and resumes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import VOCAB, layers_of, make_model, tokens
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe.models import MoEForCausalLM
from moe.models.evaluate import perplexity
from moe.routers.losses import max_violation

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

RATE = 0.125
NOAUX = {"router": {"name": "noaux_tc"}, "balance": {"aux_coef": 0.1, "bias_update_rate": RATE}}
CHECKPOINTING = {"plain": None, "reentrant": True, "non_reentrant": False}


def rows(count: int, seed: int = 5) -> list[dict[str, Tensor]]:
    """Sequences that count upwards from a random start: easy to learn. Some end early, in labels that do not count."""
    starts = torch.randint(2, VOCAB - 14, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for index, start in enumerate(starts):
        ids = torch.arange(start, start + 12)
        labels = ids.clone()
        labels[12 - index % 4 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def trainer_for(
    model: MoEForCausalLM, folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 15,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    data = {"train_dataset": rows(40), "eval_dataset": rows(8, seed=6)}
    return Trainer(model=model, args=TrainingArguments(**(arguments | options)), callbacks=callbacks, **data)


def log(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Watch(TrainerCallback):
    """Notes each layer's statistics and bias right before every optimizer step."""

    def __init__(self) -> None:
        self.micro_batches: list[list[int]] = []
        self.counts: list[Tensor] = []
        self.biases: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: MoEForCausalLM, **__: Any) -> None:
        layers = layers_of(model)
        self.micro_batches.append([layer.stats.num_micro_batches for layer in layers])
        self.counts.append(torch.stack([layer.stats.counts_E.clone() for layer in layers]))
        if hasattr(layers[0].router, "bias_E"):
            self.biases.append(torch.stack([layer.router.bias_E.clone() for layer in layers]))


def test_it_learns_the_same_with_and_without_checkpointing(tmp_path: Path) -> None:
    weights = {}
    for name, use_reentrant in CHECKPOINTING.items():
        model, watch = make_model(decoder={"initializer_range": 0.1}, **NOAUX), Watch()
        options = {"gradient_checkpointing": use_reentrant is not None}
        if use_reentrant is not None:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        trainer = trainer_for(model, tmp_path, [watch], **options)
        trainer.train()
        assert model.is_gradient_checkpointing is (use_reentrant is not None)
        found = log(trainer, "loss")
        assert len(found) == 15
        assert sum(found[-3:]) / 3 < found[0] - 1, found
        assert watch.micro_batches == [[2, 2]] * 15, "statistics cover one optimizer step"
        assert [int(c.sum()) for c in watch.counts] == [2 * 2 * 4 * 12 * 2] * 15
        weights[name] = model.state_dict()
    for name in ("reentrant", "non_reentrant"):
        for key, value in weights["plain"].items():
            torch.testing.assert_close(weights[name][key], value, atol=1e-4, rtol=1e-4, msg=f"{name} {key}")


def test_the_selection_bias_moves_once_per_optimizer_step(tmp_path: Path) -> None:
    model, watch = make_model(**NOAUX), Watch()
    trainer_for(model, tmp_path, [watch], max_steps=5).train()
    steps = [RATE * torch.sign(c.float().mean(-1, keepdim=True) - c) for c in watch.counts]
    for index, bias in enumerate(watch.biases):
        expected = sum(steps[:index], torch.zeros(2, 4))
        assert torch.equal(bias, expected)
    model.eval()
    assert torch.equal(torch.stack([layer.router.bias_E for layer in layers_of(model)]), sum(steps))
    assert sum(steps).abs().max() > RATE


def test_balance_loss_trains_the_router(tmp_path: Path) -> None:
    """From routers that send nearly everything to two experts."""
    worst = {}
    for coef in (0.0, 1.0):
        model, watch = make_model(decoder={"initializer_range": 0.05}, balance={"aux_coef": coef}), Watch()
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] += 0.3  # a direction that all tokens share
            for layer in layers_of(model):
                layer.router.weight[:2, 0] += 0.3
        trainer_for(model, tmp_path, [watch], learning_rate=1e-2).train()
        first, last = (max_violation(sum(watch.counts[part]).sum(0)) for part in (slice(0, 1), slice(12, 15)))
        assert first > 0.7, "the start is not skewed"
        worst[coef] = last.item()
    assert worst[1.0] < 0.2 < 0.4 < worst[0.0], worst


@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpointed"])
def test_resuming_is_as_if_it_never_stopped(use_reentrant: bool | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if use_reentrant is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    whole = make_model(**NOAUX)
    trainer_for(whole, tmp_path, **options).train()
    folder = tmp_path / "checkpoint-3"
    assert (folder / "model.safetensors").is_file()
    saved = MoEForCausalLM.from_pretrained(folder)
    resumed = make_model(seed=7, **NOAUX)
    trainer_for(resumed, tmp_path, **options).train(resume_from_checkpoint=str(folder))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert not torch.equal(saved.state_dict()[name], value), f"{name} did not change after the checkpoint"
    for name, value in MoEForCausalLM.from_pretrained(tmp_path / "checkpoint-6").state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_evaluation(tmp_path: Path) -> None:
    model, watch = make_model(**NOAUX), Watch()
    trainer = trainer_for(model, tmp_path, [watch], max_steps=3, eval_strategy="steps", eval_steps=1)
    for row in trainer.eval_dataset:
        row["labels"] = row["input_ids"]
    trainer.train()
    windows = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
    expected = perplexity(model.eval(), windows)["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert len(log(trainer, "eval_loss")) == 4
    assert watch.micro_batches == [[2, 2]] * 3, "evaluation disturbed the statistics"
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (8, 12, VOCAB)


def test_bf16(tmp_path: Path) -> None:
    """Mixed precision through autocast: weights stay fp32, and it learns."""
    model = make_model(decoder={"initializer_range": 0.1}, num_shared_experts=1, **NOAUX)
    trainer = trainer_for(model, tmp_path, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = log(trainer, "loss")
    assert sum(found[-3:]) / 3 < found[0] - 1, found


def test_a_tokens_worth_is_the_same_however_a_step_is_cut(tmp_path: Path) -> None:
    """8 sequences of unequal label counts as 1 x 8 or 4 x 2: `Trainer` passes num_items_in_batch."""
    norms = {}
    for size, accumulation in ((8, 1), (2, 4)):
        model = make_model(balance={"aux_coef": 0.0, "z_coef": 0.1})
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 1.0,
        }
        trainer = trainer_for(model, tmp_path, max_steps=1, **options)
        trainer.train()
        norms[size] = log(trainer, "grad_norm")[0], log(trainer, "loss")[0]
    assert norms[2][1] == pytest.approx(norms[8][1], rel=1e-4)
    assert norms[2][0] == pytest.approx(norms[8][0], rel=3e-2), "z-loss is weighed by labels, not by tokens"


def test_trained_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = make_model(**NOAUX)
    trainer = trainer_for(model, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {name for name in names if re.fullmatch(r"model.*", name)} == {"model.safetensors"}
    loaded = MoEForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded(tokens(2, 8)).logits, model.eval()(tokens(2, 8)).logits)
