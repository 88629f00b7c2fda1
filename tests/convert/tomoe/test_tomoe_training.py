"""Masks learn: the loss falls, the size comes to its target, neurons are covered, routers balanced, seeds repeat."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moe.convert.distill import distillation
from moe.convert.tomoe import ToMoEOptions, losses
from moe.convert.tomoe.gates import GatedModel
from moe.convert.tomoe.hypernet import HyperNetwork, gumbel, sample_choices, sample_masks
from moe.convert.tomoe.training import MaskTraining, TrainedMasks, train_masks

VOCAB, LAYERS, EXPERTS, NEURONS = 60, 2, 4, 64


def dense_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def windows(count: int = 8) -> Tensor:
    return torch.randint(0, VOCAB, (count, 32), generator=torch.Generator().manual_seed(2))


def options(**values: Any) -> ToMoEOptions:
    fields: dict[str, Any] = {"num_experts": EXPERTS, "batch_size": 2, "width_multiple": 1, "lr": 1e-2, "steps": 100}
    return ToMoEOptions(**fields | values)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def trained() -> tuple[TrainedMasks, list[dict[str, float]]]:
    torch.manual_seed(0)
    history: list[dict[str, float]] = []
    result = train_masks(dense_model(), windows(), options(), lambda step, steps, parts: history.append(parts))
    return result, history


def test_loss_falls_and_width_reaches_its_target(trained: tuple[TrainedMasks, list[dict[str, float]]]) -> None:
    result, history = trained
    assert len(history) == 100
    start, end = (sum(row["loss"] for row in rows) / 20 for rows in (history[:20], history[-20:]))
    assert end < 0.5 * start
    assert result.active_share == pytest.approx(0.5, abs=0.02)


def test_experts_differ_and_routers_are_balanced(trained: tuple[TrainedMasks, list[dict[str, float]]]) -> None:
    result, history = trained
    masks_LEF = result.scores_LEF > 0
    for layer in range(LAYERS):
        assert len({tuple(mask.tolist()) for mask in masks_LEF[layer]}) == EXPERTS
    assert sum(row["balance"] for row in history[-20:]) / 20 < 1.1


@pytest.mark.parametrize("coef", [0.0, 30.0])
def test_union_loss_keeps_neurons_covered(coef: float) -> None:
    result = train_masks(dense_model(), windows(), options(active_share=0.3, union_coef=coef))
    covered = (result.scores_LEF > 0).any(1).float().mean().item()
    assert covered > 0.85 if coef else covered < 0.8


def test_distillation_makes_better_masks_than_size_alone() -> None:
    """KL of the noiseless masked model on the training text, with the teacher's signal and without."""
    found = {}
    for coef in (0.0, 2.0):
        model = dense_model()
        result = train_masks(model, windows(2), options(kd_coef=coef, active_share=0.6))
        gated = GatedModel(model, EXPERTS)
        gated.set_masks((result.scores_LEF > 0).float())
        for gate, weight_ED in zip(gated.gates, result.router_LED, strict=True):
            gate.router.weight.data.copy_(weight_ED)
        with torch.no_grad():
            student, teacher = (gated.logits(windows(2), on).flatten(0, 1) for on in (True, False))
        found[coef] = distillation(student, teacher).item()
    assert found[2.0] < 0.8 * found[0.0]


def test_every_trained_parameter_gets_a_gradient_and_the_model_none() -> None:
    model = dense_model()
    training = MaskTraining(model, options())
    parts = training.losses(windows(2))
    # Distillation alone reaches all but the routers' balance; the regularisers see the hypernetwork only.
    parts["kd"].backward()
    for name, parameter in training.trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_same_seed_same_masks() -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # the state of the process does not matter
        runs.append(train_masks(dense_model(), windows(), options(steps=4, seed=seed)))
    assert torch.equal(runs[0].scores_LEF, runs[1].scores_LEF)
    assert torch.equal(runs[0].router_LED, runs[1].router_LED)
    assert not torch.equal(runs[0].scores_LEF, runs[2].scores_LEF)


def test_gates_off_is_the_dense_model_and_on_is_what_a_loop_says() -> None:
    model, ids = dense_model(), windows(2)
    with torch.no_grad():
        dense = model(ids).logits
        gated = GatedModel(model, EXPERTS)
        masks_LEF = (torch.rand(LAYERS, EXPERTS, NEURONS, generator=generator()) > 0.4).float()
        gated.set_masks(masks_LEF)
        assert torch.equal(gated.logits(ids, on=False), dense)
        on = gated.logits(ids, on=True)
        gated.remove()
        assert torch.equal(model(ids).logits, dense)
        _replace_by_loop(model, gated, masks_LEF)
        assert (model(ids).logits - on).abs().max() < 1e-5
    assert not torch.allclose(on, dense, atol=1e-2)


def _replace_by_loop(model: LlamaForCausalLM, gated: GatedModel, masks_LEF: Tensor) -> None:
    """FFNs that run token by token."""
    for layer, gate, masks_EF in zip(model.model.layers, gated.gates, masks_LEF, strict=True):
        mlp, weight_ED = layer.mlp, gate.router.weight

        def forward(x: Tensor, mlp: Any = mlp, weight_ED: Tensor = weight_ED, masks_EF: Tensor = masks_EF) -> Tensor:
            rows = []
            for x_D in x.flatten(0, -2):
                h_F = mlp.act_fn(mlp.gate_proj.weight @ x_D) * (mlp.up_proj.weight @ x_D)
                rows.append(mlp.down_proj.weight @ (h_F * masks_EF[int((weight_ED @ x_D).argmax())]))
            return torch.stack(rows).view_as(x)

        mlp.forward = forward


def test_router_gradient_is_what_other_masks_would_change() -> None:
    """d loss / d choice_j is the sum over neurons of d loss / d mask times mask_j, so unused experts count too.

    Then through the tempered softmax with the noise that was drawn, to the router.
    """
    gated = GatedModel(dense_model(), EXPERTS)
    masks_LEF = (torch.rand(LAYERS, EXPERTS, NEURONS, generator=generator()) > 0.4).float()
    gated.set_masks(masks_LEF)
    gated.set_noise(0.4, generator())
    # What each gate sees, and how the loss depends on each token's mask.
    inputs, masks = [], []
    for gate in gated.gates:

        def read(x: Tensor, read: Any = gate.read, gate: Any = gate) -> None:
            read(x)
            gate._mask.retain_grad()
            inputs.append(x.detach().flatten(0, -2))
            masks.append(gate._mask)

        gate.read = read
    gated.logits(windows(1), on=True).square().mean().backward()
    noise = generator()  # of the layers in turn
    for gate, x_TD, mask, masks_EF in zip(gated.gates, inputs, masks, masks_LEF, strict=True):
        weight_ED = gate.router.weight.detach().clone().requires_grad_(True)
        logits_TE = x_TD @ weight_ED.T
        soft_TE = ((logits_TE + gumbel(logits_TE, noise)) / 0.4).softmax(-1)
        by_choice_TE = torch.stack([(mask.grad.flatten(0, -2) * mask_F).sum(-1) for mask_F in masks_EF], dim=-1)
        (soft_TE * by_choice_TE).sum().backward()
        assert (weight_ED.grad.abs().sum(1) > 0).all()
        torch.testing.assert_close(gate.router.weight.grad, weight_ED.grad, rtol=1e-3, atol=1e-7)


def test_hypernetwork_ties_layers_together() -> None:
    """A layer's scores depend on the inputs of all layers, through the GRU in both directions."""
    network = HyperNetwork(3, EXPERTS, NEURONS, offset=3.0)
    network.inputs_LEI.requires_grad_(True)
    network()[1].sum().backward()
    assert all(network.inputs_LEI.grad[layer].abs().sum() > 0 for layer in range(3))
    assert network().mean().item() == pytest.approx(3.0, abs=0.1)


def test_masks_are_drawn_with_the_chances_of_the_scores() -> None:
    scores = torch.tensor([-2.0, 0.0, 1.0]).expand(20000, 3)
    drawn = sample_masks(scores, 0.4, generator())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), scores[0].sigmoid(), atol=0.015)


def test_choices_are_draws_from_the_softmax_with_the_relaxed_gradient() -> None:
    logits_TE = torch.tensor([0.0, 1.0, -1.0]).repeat(20000, 1).requires_grad_(True)
    drawn_TE = sample_choices(logits_TE, 0.4, generator())
    assert (drawn_TE.sum(-1) == 1).all()
    assert torch.allclose(drawn_TE.mean(0), logits_TE[0].softmax(-1), atol=0.015)
    drawn_TE[:, 0].sum().backward()
    relaxed_TE = ((logits_TE + gumbel(logits_TE, generator())) / 0.4).softmax(-1)
    (expected,) = torch.autograd.grad(relaxed_TE[:, 0].sum(), logits_TE)
    assert logits_TE.grad is not None
    assert torch.allclose(logits_TE.grad, expected, atol=1e-6)


def test_losses_against_their_formulas() -> None:
    masks_LEF = (torch.rand(LAYERS, EXPERTS, NEURONS, generator=generator()) > 0.8).float()
    sizes, unions = [], []
    for masks_EF in masks_LEF.tolist():
        sizes.append(abs(math.log((max(map(sum, masks_EF)) / NEURONS + 1e-3) / 0.501)))
        covered = sum(any(column) for column in zip(*masks_EF, strict=True)) / NEURONS
        unions.append(abs(math.log((covered + 1e-3) / 1.001)))
    assert losses.size(masks_LEF, 0.5).item() == pytest.approx(sum(sizes) / LAYERS, rel=1e-5)
    assert losses.union(masks_LEF).item() == pytest.approx(sum(unions) / LAYERS, rel=1e-5)
    assert losses.union(torch.ones(1, 2, 3)).item() == 0
    student_TV, teacher_TV = torch.randn(5, VOCAB), torch.randn(5, VOCAB)
    p_TV = teacher_TV.softmax(-1)
    expected = (p_TV * (p_TV.log() - student_TV.log_softmax(-1))).sum(-1).mean()
    assert distillation(student_TV, teacher_TV).item() == pytest.approx(expected.item(), rel=1e-5)
    collapsed_TE = torch.tensor([[9.0, 0.0, 0.0]]).expand(7, 3)
    assert losses.balance(collapsed_TE).item() == pytest.approx(3.0, rel=1e-2)


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts", 1), ("active_share", 1.0), ("lr", 0.0), ("steps", 0), ("kd_coef", -1.0)]
)
def test_wrong_options_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"tomoe.{field}="):
        options(**{field: value})
