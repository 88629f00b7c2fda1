"""The method `best`: what it finds where the truth is known, and what holds for any FFN."""

import dataclasses

import pytest
import torch
from convert.carve.best.planted import SHAPE as PLANTED_SHAPE
from convert.carve.best.planted import F, M, R, plant, same_groups
from convert.carve.carve_case import SHAPE, activations, make_case, random_carving
from convert.carve.carve_case import D as CASE_D
from convert.carve.carve_case import F as CASE_F

from moe.convert.carve import static
from moe.convert.carve.best import best as best_module
from moe.convert.carve.best.best import carve_best
from moe.convert.carve.best.gate_fit import fit_gate
from moe.convert.carve.gates import best, carved_output, expert_energy, expert_of_neuron, scores
from moe.convert.carve.neurons import output
from moe.convert.carve.refit import refit
from moe.convert.carve.types import CarveShape, Carving, LayerInputs, LinearGate
from moe.convert.dense import DenseFFN


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(ffn: DenseFFN, inputs: LayerInputs, carving: Carving, top_k: int) -> float:
    """Weighted squared error of the output, as a share of the dense one's square."""
    dense_TD = output(ffn, inputs.x_TD)
    missed_TD = carved_output(ffn, carving, inputs.x_TD, top_k) - dense_TD
    return float((inputs.weights_T @ missed_TD.square()).sum() / (inputs.weights_T @ dense_TD.square()).sum())


@pytest.mark.parametrize("seed", range(3))
def test_planted_experts_are_found(seed: int) -> None:
    case = plant(seed)
    carving = carve_best(case.ffn, case.inputs, PLANTED_SHAPE, seeded(seed))
    carving.check(F)
    found_F = expert_of_neuron(carving)
    assert same_groups(found_F, case.expert_F)
    # On the gate's experts, tokens are with their topic.
    chosen_T = scores(carving.gate, case.inputs.x_TD).argmax(1)
    topic_of_expert_R = torch.stack([case.expert_F[found_F == expert][0] for expert in range(R)])
    assert (topic_of_expert_R[chosen_T] == case.topic_T).float().mean() > 0.99
    assert error(case.ffn, case.inputs, carving, PLANTED_SHAPE.top_k) < 0.01


def test_beats_static_pruning_and_random_experts_where_tokens_differ() -> None:
    case, held_out = plant(3, noise=0.3), plant(3, num_tokens=2400, noise=0.3)
    unseen = LayerInputs(**{name: values[1200:] for name, values in vars(held_out.inputs).items()})
    carving = carve_best(case.ffn, case.inputs, PLANTED_SHAPE, seeded())
    control = static.carve(case.ffn, case.inputs, PLANTED_SHAPE, seeded())
    control = refit(case.ffn, case.inputs, control, PLANTED_SHAPE.top_k, best_module.REFIT_SHARE)
    order_F = torch.randperm(F, generator=seeded(5))
    dealt = dataclasses.replace(carving, shared_M=order_F[: 2 * M], routed_RM=order_F[2 * M :].view(R, M))
    dealt = refit(case.ffn, case.inputs, dealt, PLANTED_SHAPE.top_k, best_module.REFIT_SHARE)
    own, *others = (error(case.ffn, unseen, one, PLANTED_SHAPE.top_k) for one in (carving, control, dealt))
    assert own < 0.25 * min(others)


def test_gate_keeps_more_energy_than_the_mean_rows() -> None:
    """A gate of the members' mean gate rows is what can be had without looking at text."""
    case = make_case(seed=7, num_tokens=4000)
    assert case.ffn.gate_FD is not None
    routed_RM = carve_best(case.ffn, case.inputs, SHAPE, seeded()).routed_RM
    energy_TR = expert_energy(case.ffn, routed_RM, case.inputs.x_TD) * case.inputs.weights_T[:, None]
    mean_rows = LinearGate(weight_RD=case.ffn.gate_FD[routed_RM].mean(1), bias_R=torch.zeros(SHAPE.num_routed))
    gates = fit_gate(energy_TR[:2000], case.inputs.x_TD[:2000], SHAPE.top_k), mean_rows
    unseen_TD, unseen_TR = case.inputs.x_TD[2000:], energy_TR[2000:]
    own, baseline = (float(unseen_TR[best(scores(gate, unseen_TD), SHAPE.top_k)].sum()) for gate in gates)
    most = float(unseen_TR.topk(SHAPE.top_k).values.sum())
    assert most - own < 0.8 * (most - baseline)


@pytest.mark.parametrize("gated", [True, False])
def test_the_refit_never_hurts_on_calibration_text(gated: bool) -> None:
    case = make_case(gated=gated)
    carving = carve_best(case.ffn, case.inputs, SHAPE, seeded())
    as_it_was = dataclasses.replace(carving, down_DF=None)
    assert error(case.ffn, case.inputs, carving, SHAPE.top_k) < error(case.ffn, case.inputs, as_it_was, SHAPE.top_k)


def test_nothing_is_lost_where_everything_runs() -> None:
    case, shape = make_case(), CarveShape(num_experts=6, num_shared=2, top_k=4)
    carving = carve_best(case.ffn, case.inputs, shape, seeded())
    carving.check(CASE_F)
    assert carving.down_DF is not None
    torch.testing.assert_close(carving.down_DF, case.ffn.down_DF, rtol=1e-6, atol=1e-6)
    assert error(case.ffn, case.inputs, carving, shape.top_k) < 1e-10


@pytest.mark.parametrize(
    "shape",
    [
        CarveShape(num_experts=6, num_shared=0, top_k=3),
        CarveShape(num_experts=2, num_shared=0, top_k=1),
        CarveShape(num_experts=12, num_shared=5, top_k=2),
        CarveShape(num_experts=24, num_shared=22, top_k=1),
    ],
)
def test_any_shape(shape: CarveShape) -> None:
    case = make_case()
    carving = carve_best(case.ffn, case.inputs, shape, seeded())
    carving.check(CASE_F)
    assert carving.routed_RM.shape == (shape.num_routed, CASE_F // shape.num_experts)
    assert isinstance(carving.gate, LinearGate) and carving.gate.weight_RD.shape == (shape.num_routed, CASE_D)
    assert error(case.ffn, case.inputs, carving, shape.top_k) < 1


def test_the_generator_decides() -> None:
    case = make_case()
    one, same = (carve_best(case.ffn, case.inputs, SHAPE, seeded(3)) for _ in range(2))
    for name in ("shared_M", "routed_RM", "down_DF"):
        assert torch.equal(getattr(one, name), getattr(same, name)), name
    assert isinstance(one.gate, LinearGate) and isinstance(same.gate, LinearGate)
    assert torch.equal(one.gate.weight_RD, same.gate.weight_RD) and torch.equal(one.gate.bias_R, same.gate.bias_R)


def test_units_of_tokens_weights_do_not_matter() -> None:
    case = make_case()
    scaled = dataclasses.replace(case.inputs, weights_T=case.inputs.weights_T * 2.0**40)
    one, other = (carve_best(case.ffn, inputs, SHAPE, seeded()) for inputs in (case.inputs, scaled))
    assert torch.equal(one.routed_RM, other.routed_RM)
    assert one.down_DF is not None and other.down_DF is not None
    torch.testing.assert_close(one.down_DF, other.down_DF, rtol=1e-4, atol=1e-5)


def test_tokens_without_weight_decide_nothing() -> None:
    """With them reversed, the down-projection is as before, given the same experts and gate."""
    case, carving = make_case(), random_carving()
    weights_T, x_TD = case.inputs.weights_T.clone(), case.inputs.x_TD.clone()
    weights_T[::3] = 0
    x_TD[::3] *= -1
    one = dataclasses.replace(case.inputs, weights_T=weights_T)
    asked = []

    def same_experts(energy_TF: torch.Tensor, *_: object) -> torch.Tensor:
        asked.append(energy_TF)
        return expert_of_neuron(carving)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_module, "group_neurons", same_experts)
        for inputs in (one, dataclasses.replace(one, x_TD=x_TD)):
            carve_best(case.ffn, inputs, SHAPE, seeded())
    torch.testing.assert_close(asked[0].sum(0), asked[1].sum(0), rtol=1e-5, atol=0)
    expected_F = one.weights_T @ activations(case.ffn, one.x_TD).square() * case.ffn.down_DF.square().sum(0)
    torch.testing.assert_close(asked[0].sum(0) * weights_T.sum(), expected_F, rtol=1e-4, atol=0)


def test_many_tokens_are_sampled_over_all_windows_but_for_the_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    monkeypatch.setattr(best_module, "_GROUPING_TOKENS", 100)
    monkeypatch.setattr(best_module, "_GATE_TOKENS", 250)
    some, many = (best_module._spread(case.inputs, count) for count in (100, 250))
    assert len(some.x_TD) == 100 and torch.bincount(some.sequence_T).tolist() == [20] * 5
    assert float(some.weights_T.sum()) == pytest.approx(1)
    carving = carve_best(case.ffn, case.inputs, SHAPE, seeded())
    energy_TR = expert_energy(case.ffn, carving.routed_RM, many.x_TD) * many.weights_T[:, None]
    gate = fit_gate(energy_TR, many.x_TD, SHAPE.top_k)
    assert isinstance(carving.gate, LinearGate)
    torch.testing.assert_close(carving.gate.weight_RD, gate.weight_RD)
    torch.testing.assert_close(carving.gate.bias_R, gate.bias_R)
    refitted = refit(case.ffn, case.inputs, carving, SHAPE.top_k, best_module.REFIT_SHARE)
    assert carving.down_DF is not None and refitted.down_DF is not None
    torch.testing.assert_close(carving.down_DF, refitted.down_DF)


def test_neurons_that_never_fire_do_no_harm() -> None:
    case = make_case()
    up_FD = case.ffn.up_FD.clone()
    up_FD[:7] = 0
    ffn = dataclasses.replace(case.ffn, up_FD=up_FD)
    carving = carve_best(ffn, case.inputs, SHAPE, seeded())
    carving.check(CASE_F)
    assert not set(range(7)) & set(carving.shared_M.tolist())
    assert carving.down_DF is not None and bool(carving.down_DF.isfinite().all())
    assert isinstance(carving.gate, LinearGate) and bool(carving.gate.weight_RD.isfinite().all())
    assert error(ffn, case.inputs, carving, SHAPE.top_k) < 1
