"""Muon: each matrix moves as `torch.optim.Muon` moves it alone, the rest as AdamW; its groups, and its muP factors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import write_recipe
from torch import Tensor, nn
from transformers import LlamaConfig

from moe.models import MoEConfig, MoEForCausalLM
from moe.scaling.mup import Factors, hidden_matrices, muon_factors, width_factors
from moe.train.config import OptimConfig, load_config
from moe.train.muon import ADJUST_LR, MuonAdamW
from moe.train.optim import choose_optimizer, param_groups

BASE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def make(base: dict[str, int] | None = None, router: str = "topk") -> MoEForCausalLM:
    torch.manual_seed(0)
    decoder = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    moe = {
        "num_experts": 4,
        "num_shared_experts": 1,
        "shared_gate": True,
        "first_dense_layers": 1,
        "router": {"name": router},
    }
    return MoEForCausalLM(MoEConfig(text_config=decoder, moe=moe, mup=base))


def stack(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_matrix_moves_as_alone() -> None:
    """Experts (one of them without tokens at first, one parameter without a gradient), a matrix, a vector, over four steps."""
    shapes = {"experts": (3, 8, 5), "matrix": (6, 4), "idle": (2, 3, 3), "vector": (7,), "embedding": (5, 4)}
    ours = {name: nn.Parameter(stack(*shape)) for name, shape in shapes.items()}
    alone = {f"experts.{index}": nn.Parameter(ours["experts"][index].detach().clone()) for index in range(3)}
    alone |= {name: nn.Parameter(ours[name].detach().clone()) for name in ("matrix", "vector", "embedding")}
    muon = {"params": [ours["experts"], ours["matrix"], ours["idle"]], "muon": True, "weight_decay": 0.3}
    adamw = {"params": [ours["vector"], ours["embedding"]], "weight_decay": 0.2}
    optimizer = MuonAdamW([adamw, muon], lr=0.02, betas=(0.8, 0.9), eps=1e-6, momentum=0.7, fused=True)
    matrices = [parameter for name, parameter in alone.items() if name not in ("vector", "embedding")]
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, momentum=0.7, adjust_lr_fn=ADJUST_LR),
        torch.optim.AdamW(
            [alone["vector"], alone["embedding"]], lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=True
        ),
    ]
    idle = ours["idle"].detach().clone()
    for step in range(4):
        for seed, name in enumerate(("experts", "matrix", "vector", "embedding")):
            ours[name].grad = stack(*shapes[name], seed=10 * step + seed)
        ours["experts"].grad[1] *= step > 1  # type: ignore[index]
        for name, parameter in alone.items():
            owner, _, index = name.partition(".")
            gradient = ours[owner].grad
            assert gradient is not None
            parameter.grad = gradient[int(index)].clone() if index else gradient.clone()
        optimizer.step()
        for reference in references:
            reference.step()
        for name, parameter in alone.items():
            owner, _, index = name.partition(".")
            assert torch.equal(ours[owner][int(index)] if index else ours[owner], parameter), (step, name)
    assert torch.equal(ours["idle"], idle)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]


def test_an_update_has_singular_values_near_one_and_the_size_of_adamws() -> None:
    parameter = nn.Parameter(torch.zeros(2, 48, 32))
    optimizer = MuonAdamW([{"params": [parameter], "muon": True}], lr=1.0, weight_decay=0.0)
    parameter.grad = stack(2, 48, 32) * torch.tensor([1.0, 1e-3])[:, None, None]  # its size does not matter
    optimizer.step()
    values = torch.linalg.svdvals(parameter.detach()) / (0.2 * 48**0.5)
    assert values.min() > 0.5 and values.max() < 1.3
    assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_moments_and_what_it_refuses() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True}, {"params": [vector]}])
    assert optimizer.moments_of(matrix) == ("exp_avg",)
    assert optimizer.moments_of(vector) == ("exp_avg", "exp_avg_sq")
    matrix.grad, vector.grad = torch.ones(3, 2), torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[matrix]) == {"exp_avg"}
    with pytest.raises(ValueError, match=r"matrices and stacks of them, not shapes such as \(3,\)"):
        MuonAdamW([{"params": [vector], "muon": True}])


@pytest.mark.parametrize("router", ["topk", "cmoe", "dselect_k"])
def test_groups(router: str) -> None:
    """Muon has attention, FFNs, experts, shared experts; not embedding, unembedding, router, gate, norms and biases."""
    model = make(router=router)
    groups = param_groups(model, OptimConfig(name="muon", weight_decay=0.3))
    muon = {name for group in groups if group.get("muon") for name in group["params"]}
    assert muon == hidden_matrices(model)
    expected = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"}
    expected |= {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    experts = "model.layers.1.mlp.experts"
    expected |= {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    expected |= {f"model.layers.1.mlp.shared_experts.{name}_proj.weight" for name in ("gate_up", "down")}
    assert muon == expected
    names = [name for group in groups for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {group["weight_decay"] for group in groups if group.get("muon")} == {0.3}
    assert not any("muon" in group for group in param_groups(model, OptimConfig()))


def test_mup_factors_follow_both_sides_of_a_matrix() -> None:
    base = torch.Size((4, 8, 8))
    assert muon_factors(torch.Size((4, 32, 32)), base) == Factors(init=0.5, lr=0.5, weight_decay=2.0)
    assert muon_factors(torch.Size((4, 32, 8)), base).lr == 1.0  # outputs want 2 times the rate, which the update has
    assert muon_factors(torch.Size((4, 8, 32)), base).lr == pytest.approx(0.25)
    model = make(BASE)
    muon = hidden_matrices(model)
    found, adam = width_factors(model, muon), width_factors(model)
    for name in found:
        assert found[name].init == pytest.approx(adam[name].init), "one model, whoever trains it"
        if name not in muon:
            assert found[name] == adam[name]
    assert {round(found[name].lr, 12) for name in muon} == {0.5}
    groups = {group["name"]: group for group in param_groups(model, OptimConfig(name="muon", weight_decay=0.1))}
    slow = groups["muon lr x 0.5"]
    assert slow["lr_scale"] * slow["weight_decay"] == pytest.approx(0.1)


def test_it_learns() -> None:
    model, config = make(), OptimConfig(name="muon", lr=3e-3)
    named = dict(model.named_parameters())
    groups = [{**group, "params": [named[name] for name in group["params"]]} for group in param_groups(model, config)]
    chosen = choose_optimizer(config)
    optimizer = chosen.optimizer_class([group for group in groups if group["params"]], **chosen.options)  # type: ignore[call-arg]
    ids = torch.arange(24).remainder(7).view(2, 12)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(32), rel=0.05)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitioned_optimizers_are_refused(tmp_path: Path, stage: int) -> None:
    recipe = write_recipe(tmp_path)
    message = rf"optim.name=muon needs parallel.zero_stage=0, and it is {stage}: .* or optim.name=adamw"
    with pytest.raises(ValueError, match=message):
        load_config(recipe, ["optim.name=muon", f"parallel.zero_stage={stage}"])
    assert load_config(recipe, ["optim.name=muon", "parallel.zero_stage=0"]).parallel.ep_size == 2


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.name='moun'.*'adamw' or 'muon'"):
        load_config(write_recipe(tmp_path), ["optim.name=moun"])


def options_of(config: OptimConfig) -> dict[str, Any]:
    return choose_optimizer(config).options


def test_options_come_from_the_config() -> None:
    config = OptimConfig(name="muon", lr=2e-3, betas=(0.8, 0.9), eps=1e-5, muon_momentum=0.9)
    assert options_of(config) == {"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-5, "fused": True, "momentum": 0.9}
    assert choose_optimizer(OptimConfig()).optimizer_class is torch.optim.AdamW
