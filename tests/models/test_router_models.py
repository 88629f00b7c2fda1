"""Every router in a causal language model: training with and without recomputed activations, saving, generating."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import VOCAB, layers_of, make_model, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

from moe.models import MoEForCausalLM
from moe.routers import ROUTERS

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:router .* evaluates"),  # groups are tiny here
]

STEPS = 4
# How a causal model may use routers that see later tokens by default, and sizes that fit a tiny run.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "soft": [{"group": "position", "group_size": 4}],
    "sinkhorn": [{"group": "position", "group_size": 4}],
    "expert_choice": [{"group_size": 4}],
    "mixture_of_tokens": [{"group_size": 4}, {"group_size": 4, "sparse_after": 2}],
    "kmeans": [{"update_every": 2, "num_samples": 64}],
    "hash": [{}, {"method": "balanced", "vocab_size": VOCAB}],
}
CASES = [(name, options) for name in ROUTERS for options in OPTIONS.get(name, [{}])]


def model_for(name: str, options: dict[str, Any], seed: int = 0) -> MoEForCausalLM:
    model = make_model(seed=seed, router={"name": name, **options}, decoder={"initializer_range": 0.1})
    for layer in layers_of(model):
        if getattr(layer.router, "needs_token_counts", False):
            layer.router.set_token_counts(torch.arange(VOCAB))
    return model


def rows() -> list[dict[str, Tensor]]:
    """Sequences that count upwards from a random start: easy to learn."""
    starts = torch.randint(2, VOCAB - 12, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    return [
        {"input_ids": torch.arange(start, start + 12), "labels": torch.arange(start, start + 12)} for start in starts
    ]


def trained(
    name: str, options: dict[str, Any], checkpointing: bool, folder: Path
) -> tuple[MoEForCausalLM, list[float]]:
    """A model after some steps of HF `Trainer`, and the loss of each."""
    model = model_for(name, options)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return model.eval(), losses


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_train_save_load_generate(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, losses = trained(name, options, False, tmp_path)
    again, recomputed = trained(name, options, True, tmp_path)
    assert recomputed == pytest.approx(losses, rel=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=1e-4, rtol=1e-4, msg=key)
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "saved")
    loaded, info = MoEForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    ids_BL = tokens(4, 9)
    assert torch.equal(loaded(ids_BL).logits, model(ids_BL).logits)
    ours, theirs = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value), key
        assert theirs[key].dtype == value.dtype, key

    cached = loaded.generate(ids_BL, max_new_tokens=5, do_sample=False)
    assert cached.shape == (4, 14)
    if name != "round_robin":  # counts the tokens of a call, and with a cache a call has other tokens
        assert torch.equal(cached, loaded.generate(ids_BL, max_new_tokens=5, do_sample=False, use_cache=False))
