"""From a carving to weights: the layer computes what the carving says, and the linear gate's weights are nearly 1."""

import dataclasses
from typing import Any

import pytest
import torch
from convert.carve.carve_case import SHAPE, Case, D, F, generator, make_case, random_carving
from torch import Tensor

from moe.convert.carve import CARVERS
from moe.convert.carve.build import SCALE, build_layer, moe_spec, rescale
from moe.convert.carve.gates import best, carved_output, fit_linear_gate, scores
from moe.convert.carve.neurons import output
from moe.convert.carve.refit import refit
from moe.convert.carve.types import CarveShape, Carving
from moe.layer import MoELayer, MoESpec


def layer_of(case: Case, carving: Carving, shape: CarveShape, dtype: torch.dtype = torch.float32) -> MoELayer:
    """The layer with the carving's weights, loaded under the names of `MoEWeights`."""
    activation = "gelu" if case.ffn.gate_FD is None else "swiglu"
    spec = moe_spec(shape, F // shape.num_experts, activation, type(carving.gate))
    layer = MoELayer(D, MoESpec.from_dict(spec), F).to(dtype)
    weights = build_layer(case.ffn, carving, shape.top_k, case.inputs.x_TD, dtype)
    layer.load_state_dict(dict(weights.named("")))
    return layer.eval()


@torch.no_grad()
def run(layer: MoELayer, x_TD: Tensor) -> Tensor:
    return layer(x_TD)


SHAPES = (SHAPE, CarveShape(num_experts=8, num_shared=0, top_k=3), CarveShape(num_experts=6, num_shared=3, top_k=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", CARVERS)
def test_the_layer_computes_what_the_carving_says(method: str, shape: CarveShape) -> None:
    case = make_case()
    carving = CARVERS[method](case.ffn, case.inputs, shape, generator())
    for made in (carving, refit(case.ffn, case.inputs, carving, shape.top_k)):
        layer, x_TD = layer_of(case, made, shape), case.inputs.x_TD
        expected_TD = carved_output(case.ffn, made, x_TD, shape.top_k)
        wrong_T = (run(layer, x_TD) - expected_TD).norm(dim=1) / expected_TD.norm(dim=1)
        # A token at a tie may choose otherwise; the weights are 1 but for the scale.
        assert wrong_T.quantile(0.99) < 5 * SCALE
        assert torch.equal(layer.router(x_TD).counts_E.sum(), torch.tensor(len(x_TD) * shape.top_k))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", CARVERS)
def test_with_every_expert_it_is_the_dense_ffn(method: str, gated: bool) -> None:
    if not gated and method in ("cmoe", "weaver"):
        pytest.skip("needs a gate projection")
    case, shape = make_case(gated=gated), dataclasses.replace(SHAPE, top_k=SHAPE.num_routed)
    carving = CARVERS[method](case.ffn, case.inputs, shape, generator())
    layer, x_TD = layer_of(case, carving, shape), case.inputs.x_TD
    assert (layer.router(x_TD).weights_N == 1).all()
    torch.testing.assert_close(run(layer, x_TD), output(case.ffn, x_TD), atol=1e-4, rtol=1e-5)


def test_the_gate_keeps_its_order_and_its_weights_are_nearly_one() -> None:
    """In fp32, on twenty thousand tokens, with the bias where GLM4-MoE has it."""
    case, carving = make_case(num_tokens=20_000), random_carving()
    gate = fit_linear_gate(case.ffn, case.inputs, carving.routed_RM)
    layer = layer_of(case, dataclasses.replace(carving, gate=gate), SHAPE)
    routing = layer.router(case.inputs.x_TD)
    wanted = best(scores(gate, case.inputs.x_TD), SHAPE.top_k)
    got = torch.zeros_like(wanted).scatter_(1, routing.expert_ids_N.view(-1, SHAPE.top_k), True)
    assert (got != wanted).any(1).float().mean() < 2e-3
    assert (routing.weights_N - 1).abs().max() < 8 * SCALE
    assert (routing.weights_N - 1).abs().mean() < SCALE / 2


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_a_gates_own_scale_and_offset_do_not_matter(factor: float) -> None:
    case, carving = make_case(), random_carving()
    gate = carving.gate
    other = dataclasses.replace(
        gate,
        weight_RD=factor * (gate.weight_RD + torch.randn(D, generator=generator())),
        bias_R=factor * (gate.bias_R + 7),
    )
    first, second = (rescale(g, case.inputs.x_TD, SCALE) for g in (gate, other))
    torch.testing.assert_close(first.weight_RD, second.weight_RD, atol=1e-5 * SCALE, rtol=1e-3)
    torch.testing.assert_close(first.bias_R, second.bias_R, atol=1e-5 * SCALE, rtol=1e-3)
    logits_TR = case.inputs.x_TD @ first.weight_RD.T
    assert logits_TR.square().mean().sqrt().item() == pytest.approx(SCALE, rel=1e-3)


def test_experts_in_another_order_give_the_same_output() -> None:
    case, carving = make_case(), random_carving()
    order_R = torch.tensor([2, 0, 3, 1])
    moved = dataclasses.replace(
        carving,
        shared_M=carving.shared_M.flip(0),
        routed_RM=carving.routed_RM[order_R].flip(1),
        gate=dataclasses.replace(
            carving.gate, weight_RD=carving.gate.weight_RD[order_R], bias_R=carving.gate.bias_R[order_R]
        ),
    )
    first, second = (run(layer_of(case, c, SHAPE), case.inputs.x_TD) for c in (carving, moved))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_dtypes() -> None:
    case, carving = make_case(), random_carving()
    weights = build_layer(case.ffn, carving, SHAPE.top_k, case.inputs.x_TD, torch.bfloat16)
    found: dict[str, Any] = {name: tensor.dtype for name, tensor in weights.named("")}
    assert found.pop("router.bias_E") == torch.float32
    assert set(found.values()) == {torch.bfloat16}
    assert all(tensor.is_contiguous() for _, tensor in weights.named(""))


def test_one_expert_per_token_freezes_the_gate() -> None:
    """Its weight is 1 whatever it says, so it could not learn."""
    spec = moe_spec(CarveShape(num_experts=6, num_shared=2, top_k=1), 4, "swiglu", type(random_carving().gate))
    assert spec["router"]["frozen"]
    MoESpec.from_dict(spec)
