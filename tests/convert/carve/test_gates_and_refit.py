"""What runs in a carved layer, the refit of the down-projection and the fitted gate, against slow definitions."""

import dataclasses

import pytest
import torch
from convert.carve.carve_case import SHAPE, D, F, activations, generator, make_case, oracle_mask, random_carving

from moe.convert.carve.gates import carved_output, expert_energy, fit_linear_gate, running_neurons, scores
from moe.convert.carve.measure import measure
from moe.convert.carve.neurons import CHUNK, energy, output
from moe.convert.carve.refit import refit
from moe.convert.carve.ridge import solve_ridge
from moe.convert.carve.types import CarveShape, LayerInputs, NeuronGate

K = SHAPE.top_k


@pytest.mark.parametrize("gated", [True, False])
def test_output_is_that_of_the_neurons_that_run(gated: bool) -> None:
    case, carving = make_case(gated=gated), random_carving()
    x_TD = case.inputs.x_TD
    h_TF = activations(case.ffn, x_TD)
    torch.testing.assert_close(output(case.ffn, x_TD), h_TF @ case.ffn.down_DF.T, atol=1e-4, rtol=1e-4)
    mask_TF = oracle_mask(carving, x_TD, K)
    assert torch.equal(running_neurons(carving, x_TD, K), mask_TF)
    expected_TD = (h_TF * mask_TF) @ case.ffn.down_DF.T
    torch.testing.assert_close(carved_output(case.ffn, carving, x_TD, K), expected_TD, atol=1e-4, rtol=1e-4)
    refitted = dataclasses.replace(carving, down_DF=2 * case.ffn.down_DF)
    torch.testing.assert_close(carved_output(case.ffn, refitted, x_TD, K), 2 * expected_TD, atol=1e-4, rtol=1e-4)


def test_energy() -> None:
    case = make_case()
    squares_TF = activations(case.ffn, case.inputs.x_TD).square() * case.ffn.down_DF.square().sum(0)
    expected_F = case.inputs.weights_T @ squares_TF
    torch.testing.assert_close(energy(case.ffn, case.inputs.x_TD, case.inputs.weights_T), expected_F, rtol=1e-4, atol=0)
    routed_RM = random_carving().routed_RM
    expected_TR = torch.stack([squares_TF[:, members].sum(1) for members in routed_RM], 1)
    torch.testing.assert_close(expert_energy(case.ffn, routed_RM, case.inputs.x_TD), expected_TR, rtol=1e-4, atol=1e-5)


def test_a_neuron_gate_scores_by_the_size_of_its_neuron() -> None:
    case = make_case()
    gate_RD, up_RD = case.ffn.gate_FD[:4], case.ffn.up_FD[:4]
    expected_TR = activations(case.ffn, case.inputs.x_TD)[:, :4].abs()
    got_TR = scores(NeuronGate(gate_RD=gate_RD, up_RD=up_RD), case.inputs.x_TD)
    torch.testing.assert_close(got_TR, expected_TR, atol=1e-5, rtol=1e-5)


def test_ridge_is_the_minimum_of_its_objective() -> None:
    """The gradient of |Y - XW|^2 + share * sum_i diag_i |W_i|^2 is zero there; an input that is always zero gets zero."""
    x_NI = torch.randn(50, 6, generator=generator()).double() * torch.tensor([1.0, 100.0, 1e-3, 1.0, 0.0, 5.0])
    y_NO = torch.randn(50, 3, generator=generator(1)).double()
    gram_II = x_NI.T @ x_NI
    w_IO = solve_ridge(gram_II, x_NI.T @ y_NO, 0.3)
    assert (w_IO[4] == 0).all()
    gradient_IO = gram_II @ w_IO - x_NI.T @ y_NO + 0.3 * gram_II.diagonal()[:, None] * w_IO
    assert gradient_IO.abs().max() < 1e-9 * (x_NI.T @ y_NO).abs().max()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_tokens", [600, 2 * CHUNK + 7])
def test_refit_is_the_minimum_of_its_objective(gated: bool, num_tokens: int) -> None:
    """Against one solve in float64 with all tokens at once."""
    case, carving = make_case(num_tokens=num_tokens, gated=gated), random_carving()
    down_DF = refit(case.ffn, case.inputs, carving, K, share=0.05).down_DF
    h_TF = activations(case.ffn, case.inputs.x_TD).double()
    kept_TF = h_TF * running_neurons(carving, case.inputs.x_TD, K)
    weights_T1 = case.inputs.weights_T.double()[:, None]
    dense_FD = case.ffn.down_DF.double().T
    gram_FF = kept_TF.T @ (kept_TF * weights_T1)
    penalty_FF = torch.diag(0.05 * gram_FF.diagonal())
    expected_FD = torch.linalg.solve(
        gram_FF + penalty_FF, kept_TF.T @ (h_TF @ dense_FD * weights_T1) + penalty_FF @ dense_FD
    )
    torch.testing.assert_close(down_DF.T.double(), expected_FD, atol=2e-3, rtol=2e-3)
    again = refit(case.ffn, case.inputs, dataclasses.replace(carving, down_DF=torch.randn(D, F)), K, share=0.05)
    torch.testing.assert_close(again.down_DF, down_DF)  # starts from the dense one, whatever is there


def test_refit_helps_and_keeps_the_rest() -> None:
    case, carving = make_case(), random_carving()
    fitted = refit(case.ffn, case.inputs, carving, K)
    assert torch.equal(fitted.routed_RM, carving.routed_RM)
    before, after = (measure(case.ffn, case.inputs, c, K) for c in (carving, fitted))
    assert after.energy_kept > before.energy_kept + 0.1
    assert after.recall == before.recall


def test_refit_changes_nothing_where_every_neuron_runs() -> None:
    case = make_case()
    fitted = refit(case.ffn, case.inputs, random_carving(), SHAPE.num_routed)
    torch.testing.assert_close(fitted.down_DF, case.ffn.down_DF)


def test_measure_against_its_definition() -> None:
    case, carving = make_case(), random_carving()
    found = measure(case.ffn, case.inputs, carving, K)
    x_TD, weights_T = case.inputs.x_TD, case.inputs.weights_T
    h_TF, mask_TF = activations(case.ffn, x_TD), oracle_mask(carving, x_TD, K)
    lost_T = ((h_TF * (1 - mask_TF)) @ case.ffn.down_DF.T).square().sum(1)
    total_T = (h_TF @ case.ffn.down_DF.T).square().sum(1)
    assert found.energy_kept == pytest.approx(float(1 - weights_T @ lost_T / (weights_T @ total_T)), abs=1e-4)
    norms_F = case.ffn.down_DF.square().sum(0)
    hits = 0
    for h_F, mask_F in zip(h_TF, mask_TF, strict=True):
        energies = [float((h_F[members].square() * norms_F[members]).sum()) for members in carving.routed_RM]
        best = sorted(range(4), key=lambda e: -energies[e])[:K]
        hits += sum(bool(mask_F[carving.routed_RM[e][0]]) for e in best)
    assert found.recall == pytest.approx(hits / (K * len(x_TD)))
    loads = [float(mask_TF[:, members[0]].mean()) * 4 / K for members in carving.routed_RM]
    assert (found.least_load, found.most_load) == (pytest.approx(min(loads)), pytest.approx(max(loads)))


def test_the_fitted_gate_finds_what_is_linear() -> None:
    """One neuron per expert whose sqrt(energy) is linear in x where it is not zero: the fit must nearly find the best."""
    case = make_case(num_tokens=5000)
    carving = random_carving()
    gate = fit_linear_gate(case.ffn, case.inputs, carving.routed_RM)
    fitted = dataclasses.replace(carving, gate=gate)
    recall = {name: measure(case.ffn, case.inputs, c, K).recall for name, c in (("fit", fitted), ("random", carving))}
    assert recall["fit"] > recall["random"] + 0.1


def test_the_fitted_gate_is_weighted_least_squares() -> None:
    case, routed_RM = make_case(), random_carving().routed_RM
    gate = fit_linear_gate(case.ffn, case.inputs, routed_RM)
    x_TD, w_T1 = case.inputs.x_TD.double(), case.inputs.weights_T.double()[:, None]
    target_TR = expert_energy(case.ffn, routed_RM, case.inputs.x_TD).sqrt().double()
    ones_TI = torch.cat((x_TD, torch.ones(len(x_TD), 1).double()), 1)
    expected_IR = torch.linalg.solve(ones_TI.T @ (ones_TI * w_T1), ones_TI.T @ (target_TR * w_T1))
    torch.testing.assert_close(gate.weight_RD.T.double(), expected_IR[:-1], atol=0.02, rtol=0.02)
    torch.testing.assert_close(gate.bias_R.double(), expected_IR[-1], atol=0.02, rtol=0.02)


def test_token_order_does_not_matter() -> None:
    case, carving = make_case(), random_carving()
    order_T = torch.randperm(len(case.inputs.x_TD), generator=generator())
    shuffled = LayerInputs(
        x_TD=case.inputs.x_TD[order_T],
        weights_T=case.inputs.weights_T[order_T],
        sequence_T=case.inputs.sequence_T[order_T],
    )
    first, second = (refit(case.ffn, inputs, carving, K).down_DF for inputs in (case.inputs, shuffled))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"--experts 5 does not divide the FFN width 24; use one of \[2, 3, 4, 6, 8"):
        CarveShape(num_experts=5, num_shared=1, top_k=2).check(F)
    with pytest.raises(ValueError, match=r"--top-k 5 must lie between 1 and the 4 routed experts"):
        CarveShape(num_experts=6, num_shared=2, top_k=5).check(F)
    with pytest.raises(ValueError, match=r"--experts 6 --shared 5 leaves 1 routed"):
        CarveShape(num_experts=6, num_shared=5, top_k=1).check(F)
