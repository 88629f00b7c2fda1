"""What holds for every carving method; and LLaMA-MoE's random split and the static control."""

import dataclasses

import pytest
import torch
from convert.carve.carve_case import SHAPE, Case, D, F, activations, generator, make_case

from moe.convert.carve import CARVERS
from moe.convert.carve.gates import best, running_neurons, scores
from moe.convert.carve.layer import carve_layer
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.refit import refit as refit_down
from moe.convert.carve.types import CarveShape, Carving, LinearGate
from moe.convert.dense import DenseFFN

SHAPES = (
    SHAPE,
    CarveShape(num_experts=8, num_shared=0, top_k=1),
    CarveShape(num_experts=12, num_shared=4, top_k=8),
    CarveShape(num_experts=3, num_shared=1, top_k=1),
)
DRAWS = {"best", "weaver", "llama-moe"}  # use the random generator


def carve(case: Case, method: str, shape: CarveShape = SHAPE, seed: int = 0) -> Carving:
    return CARVERS[method](case.ffn, case.inputs, shape, generator(seed))


def permuted(case: Case, order_F: torch.Tensor) -> Case:
    ffn = DenseFFN(
        gate_FD=case.ffn.gate_FD[order_F], up_FD=case.ffn.up_FD[order_F], down_DF=case.ffn.down_DF[:, order_F]
    )
    return dataclasses.replace(case, ffn=ffn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", CARVERS)
def test_every_neuron_is_in_one_expert(method: str, shape: CarveShape) -> None:
    carving = carve(make_case(), method, shape)
    carving.check(F)
    per_expert = F // shape.num_experts
    assert carving.shared_M.shape == (shape.num_shared * per_expert,)
    assert carving.routed_RM.shape == (shape.num_routed, per_expert)
    assert carving.routed_RM.dtype == carving.shared_M.dtype == torch.int64
    assert scores(carving.gate, torch.randn(3, D)).isfinite().all()


@pytest.mark.parametrize("method", CARVERS)
def test_inputs_are_left_alone_and_seeds_decide(method: str) -> None:
    case = make_case()
    before = [tensor.clone() for tensor in (*vars(case.ffn).values(), *vars(case.inputs).values())]
    first, again, other = (carve(case, method, seed=seed) for seed in (0, 0, 1))
    after = (*vars(case.ffn).values(), *vars(case.inputs).values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(first.routed_RM, again.routed_RM)
    same = torch.equal(first.routed_RM.sort().values, other.routed_RM.sort().values)
    assert same == (method not in DRAWS)


@pytest.mark.parametrize("method", set(CARVERS) - DRAWS)
def test_the_order_of_neurons_does_not_matter(method: str) -> None:
    """The same sets of neurons run for each token, named by where they are now."""
    case, order_F = make_case(), torch.randperm(F, generator=generator(3))
    x_TD = case.inputs.x_TD
    plain = running_neurons(carve(case, method), x_TD, SHAPE.top_k)
    moved = running_neurons(carve(permuted(case, order_F), method), x_TD, SHAPE.top_k)
    assert (moved != plain[:, order_F]).float().mean() < 0.01  # ties of counts and sums may fall otherwise


@pytest.mark.parametrize("method", CARVERS)
def test_a_wrong_shape_names_the_option(method: str) -> None:
    with pytest.raises(ValueError, match="--experts 5 does not divide"):
        carve(make_case(), method, CarveShape(num_experts=5, num_shared=1, top_k=2))


@pytest.mark.parametrize("method", CARVERS)
def test_an_ffn_without_gate_is_carved_or_refused(method: str) -> None:
    case = make_case(gated=False)
    if method in ("cmoe", "weaver"):
        with pytest.raises(ValueError, match=f"--method {method} .* gate projection"):
            carve(case, method)
    else:
        carve(case, method).check(F)


@pytest.mark.parametrize("method", CARVERS)
@pytest.mark.parametrize("gate", ["own", "ridge"])
@pytest.mark.parametrize("refit", [True, False])
def test_layers(method: str, gate: str, refit: bool) -> None:
    case = make_case()
    options = CarveOptions(shape=SHAPE, method=method, gate=gate, refit=refit, seed=2)
    carving = carve_layer(case.ffn, case.inputs, options, layer=1)
    assert (carving.down_DF is not None) == refit
    assert isinstance(carving.gate, LinearGate) == (gate == "ridge" or method != "cmoe")
    again = carve_layer(case.ffn, case.inputs, options, layer=1)
    assert torch.equal(carving.routed_RM, again.routed_RM)
    other = carve_layer(case.ffn, case.inputs, options, layer=2)
    assert torch.equal(carving.routed_RM, other.routed_RM) == (method not in DRAWS)
    if refit and gate == "ridge":  # not to the choices of the method's own gate
        fitted = refit_down(case.ffn, case.inputs, carving, SHAPE.top_k)
        torch.testing.assert_close(carving.down_DF, fitted.down_DF)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="--gate 'mlp' is unknown; use own or ridge"):
        CarveOptions(shape=SHAPE, method="cmoe", gate="mlp")


def test_static_runs_the_neurons_with_the_most_energy_for_every_token() -> None:
    case = make_case()
    carving = carve(case, "static")
    energy_F = (
        case.inputs.weights_T @ activations(case.ffn, case.inputs.x_TD).square()
    ) * case.ffn.down_DF.square().sum(0)
    kept = set(energy_F.topk(16).indices.tolist())  # 2 shared experts and 2 routed ones of 4 neurons
    mask_TF = running_neurons(carving, torch.randn(50, D) * 100, SHAPE.top_k)
    assert (mask_TF == mask_TF[0]).all()
    assert set(mask_TF[0].nonzero()[:, 0].tolist()) == kept


def test_token_weights_count() -> None:
    """A neuron that is large on tokens without weight alone is not kept."""
    case = make_case()
    least = int(carve(case, "static").routed_RM[-1, -1])
    x_TD = case.inputs.x_TD.clone()
    x_TD[case.inputs.weights_T < 1e-5] = 10 * (case.ffn.gate_FD[least] + case.ffn.up_FD[least])
    inputs = dataclasses.replace(case.inputs, x_TD=x_TD)
    flat = dataclasses.replace(inputs, weights_T=torch.ones(len(x_TD)))
    assert least not in CARVERS["static"](case.ffn, inputs, SHAPE, generator()).shared_M
    assert least in CARVERS["static"](case.ffn, flat, SHAPE, generator()).shared_M


def test_llama_moe_is_random() -> None:
    case = make_case()
    counts_F = torch.zeros(F)
    for seed in range(300):
        counts_F[carve(case, "llama-moe", seed=seed).shared_M] += 1
    assert (counts_F / 300 - 1 / 3).abs().max() < 0.15
    chosen_TR = best(scores(carve(case, "llama-moe").gate, torch.randn(2000, D)), 2)
    assert (chosen_TR.float().mean(0) - 0.5).abs().max() < 0.35
