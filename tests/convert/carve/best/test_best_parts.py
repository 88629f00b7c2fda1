"""Grouping and gate of the method `best`, each where the answer is known."""

import torch
from convert.carve.best.planted import plant
from torch import Tensor

from moe.convert.carve.best.gate_fit import fit_gate
from moe.convert.carve.best.grouping import group_neurons
from moe.convert.carve.gates import best, scores
from moe.convert.carve.types import CarveShape


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_grouping_finds_who_runs_together() -> None:
    """Energies of three topics and an always-on group, from which tokens' inputs tell the topic."""
    topic_T = torch.arange(600) % 3
    group_F = torch.tensor([0, 1, 2, 3] * 4)
    energy_TF = (
        0.05 + (topic_T[:, None] == group_F).double() + 2.0 * (group_F == 3) + 0.01 * normal(0, 600, 16).square()
    )
    x_TD = torch.nn.functional.one_hot(topic_T, 5).double() + 0.05 * normal(1, 600, 5)
    shape = CarveShape(num_experts=4, num_shared=1, top_k=1)
    found_F = group_neurons(energy_TF, x_TD, shape, torch.Generator().manual_seed(0))
    assert torch.bincount(found_F).tolist() == [4, 4, 4, 4]
    assert torch.equal(found_F == 3, group_F == 3)
    assert torch.equal(found_F[:, None] == found_F, group_F[:, None] == group_F)


def test_grouping_lets_neurons_change_places() -> None:
    """A start by k-means on the gate's slopes is not where it ends: a neuron of much energy that only one topic needs is routed."""
    topic_T = torch.arange(900) % 3
    group_F = torch.tensor([0, 1, 2, 3] * 4)
    energy_TF = 0.01 + 6.0 * (topic_T[:, None] == group_F) + 1.0 * (group_F == 3) + 0.01 * normal(0, 900, 16).square()
    assert energy_TF.sum(0)[group_F == 3].max() < energy_TF.sum(0)[group_F != 3].min()
    x_TD = torch.nn.functional.one_hot(topic_T, 5).double() + 0.05 * normal(1, 900, 5)
    shape = CarveShape(num_experts=4, num_shared=1, top_k=1)
    found_F = group_neurons(energy_TF, x_TD, shape, torch.Generator().manual_seed(0))
    assert torch.equal(found_F == 3, group_F == 3)


def test_grouping_does_not_depend_on_the_inputs_units() -> None:
    """An input that hardly moves would otherwise decide on its own where k-means starts."""
    energy_TF, x_TD = normal(0, 500, 24).square(), normal(1, 500, 8)
    x_TD[:, 3] = 0
    shape = CarveShape(num_experts=6, num_shared=1, top_k=2)
    units_D = torch.logspace(-4, 4, 8, dtype=torch.float64)
    one_F, other_F = (
        group_neurons(energy_TF, inputs_TD, shape, torch.Generator().manual_seed(0))
        for inputs_TD in (x_TD, x_TD * units_D + 3 * units_D)
    )
    assert torch.equal(one_F, other_F)


def test_gate_learns_a_linear_rule_and_weighs_by_stakes() -> None:
    """Two experts; most tokens hardly care, few care much, and the two kinds disagree about the sign of the rule."""
    x_TD = normal(0, 2000, 4).float()
    cares_T = torch.arange(2000) % 10 == 0
    signal_T = torch.where(cares_T, x_TD[:, 0], -x_TD[:, 0])
    stakes_T = torch.where(cares_T, 1.0, 0.01)
    energy_TR = torch.stack((stakes_T * (signal_T > 0), stakes_T * (signal_T <= 0)), 1)
    chosen_TR = best(scores(fit_gate(energy_TR, x_TD, 1), x_TD), 1)
    right_T = (chosen_TR == best(energy_TR, 1)).all(1)
    assert right_T[cares_T].float().mean() > 0.97 and right_T[~cares_T].float().mean() < 0.1


def test_gate_does_not_depend_on_the_inputs_units() -> None:
    case = plant()
    energy_TR = torch.nn.functional.one_hot(case.topic_T, 4).float()
    x_TD = case.inputs.x_TD
    units_D = torch.logspace(-3, 3, x_TD.shape[1])
    one, other = fit_gate(energy_TR, x_TD, 1), fit_gate(energy_TR, x_TD * units_D + 5 * units_D, 1)
    chosen_T, other_T = scores(one, x_TD).argmax(1), scores(other, x_TD * units_D + 5 * units_D).argmax(1)
    assert (chosen_T == case.topic_T).float().mean() > 0.99 and (other_T == chosen_T).float().mean() > 0.99
