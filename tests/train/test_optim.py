"""Learning rates by hand, and optimizer groups that hold every parameter once."""

import itertools
import math

import pytest
from torch import nn
from transformers import LlamaConfig

from moe.models import MoEConfig, MoEForCausalLM
from moe.train.config import OptimConfig
from moe.train.optim import learning_rate, param_groups


def schedule(total: int, **options: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 2.0, "warmup_steps": 4, **options})
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(name: str) -> None:
    assert schedule(20, schedule=name)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_without_warmup_the_first_step_has_the_peak(name: str) -> None:
    assert schedule(20, schedule=name, warmup_steps=0)[0] == 2.0


def test_constant() -> None:
    assert schedule(20, schedule="constant")[4:] == [2.0] * 16


def test_wsd_has_a_plateau_and_a_linear_decay() -> None:
    rates = schedule(20, schedule="wsd", decay_fraction=0.25)
    assert rates[4:15] == [2.0] * 11
    assert rates[15:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_wsd_ends_at_the_final_fraction() -> None:
    rates = schedule(20, schedule="wsd", decay_fraction=0.25, final_lr_fraction=0.1)
    assert rates[16:] == pytest.approx([0.2 + 1.8 * left for left in (0.8, 0.6, 0.4, 0.2)])


def test_wsd_without_decay_keeps_its_plateau() -> None:
    assert schedule(20, schedule="wsd", decay_fraction=0.0)[4:] == [2.0] * 16


def test_cosine() -> None:
    rates = schedule(20, schedule="cosine", final_lr_fraction=0.1)
    assert rates[4] == 2.0
    assert rates[12] == pytest.approx(1.1), "half way between the peak and the end"
    assert rates[19] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 15 / 16)))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def model(tied: bool) -> nn.Module:
    decoder = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return MoEForCausalLM(MoEConfig(text_config=decoder, moe={"num_experts": 4, "num_shared_experts": 1}))


@pytest.mark.parametrize("tied", [True, False])
def test_groups_partition_the_parameters(tied: bool) -> None:
    made = model(tied)
    groups = {group["name"]: group for group in param_groups(made, OptimConfig(weight_decay=0.3))}
    names = [name for group in groups.values() for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in made.named_parameters())
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert all(name.endswith((".bias", "norm.weight")) for name in groups["no_decay"]["params"])
    assert len(groups["no_decay"]["params"]) == 2 * 6 + 1, "of each layer 2 norms and 4 biases; the last norm"
    assert "model.layers.1.mlp.router.weight" in groups["decay"]["params"]


def test_frozen_parameters_are_in_no_group() -> None:
    made = model(tied=True)
    frozen = made.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    names = [name for group in param_groups(made, OptimConfig()) for name in group["params"]]
    assert not frozen.requires_grad
    assert "model.embed_tokens.weight" not in names
    assert len(names) == len(list(made.parameters())) - 1
