"""CMoE's carving against a plain version of the paper's steps with its T x F matrix and its n x n assignment."""

import pytest
import torch
from convert.carve.carve_case import SHAPE, F, activations, generator, make_case
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.convert.carve.cmoe import carve, co_marks, mark
from moe.convert.carve.types import CarveShape, NeuronGate
from moe.convert.dense import DenseFFN
from moe.routers.assignment import balanced_assignment


def unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True)


def marks_of(case: object, num_marks: int) -> Tensor:
    """(T, F) 0 or 1, token by token."""
    ffn = DenseFFN(gate_FD=unit(case.ffn.gate_FD), up_FD=unit(case.ffn.up_FD), down_DF=case.ffn.down_DF)
    h_TF = activations(ffn, unit(case.inputs.x_TD)).abs()
    marks_TF = torch.zeros_like(h_TF)
    for token, h_F in enumerate(h_TF):
        marks_TF[token, h_F.argsort(descending=True)[:num_marks]] = 1
    return marks_TF


@pytest.mark.parametrize("num_marks", [1, 10])
def test_marks(num_marks: int) -> None:
    case = make_case()
    ffn = DenseFFN(gate_FD=unit(case.ffn.gate_FD), up_FD=unit(case.ffn.up_FD), down_DF=case.ffn.down_DF)
    marks_TA = mark(ffn, case.inputs.x_TD, num_marks)
    assert marks_TA.shape == (len(case.inputs.x_TD), num_marks)
    expected_TF = marks_of(case, num_marks)
    assert torch.equal(torch.zeros_like(expected_TF).scatter_(1, marks_TA, 1.0), expected_TF)
    columns_FC = torch.randn(F, 3)
    torch.testing.assert_close(
        co_marks(marks_TA, columns_FC), expected_TF.T @ (expected_TF @ columns_FC), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [SHAPE, CarveShape(num_experts=3, num_shared=0, top_k=1)], ids=str)
def test_against_the_papers_steps(shape: CarveShape) -> None:
    case = make_case(num_tokens=900)
    carving = carve(case.ffn, case.inputs, shape, generator())
    m = F // shape.num_experts
    marks_TF = marks_of(case, 10)
    rates_F = marks_TF.sum(0)
    order = sorted(range(F), key=lambda neuron: (-int(rates_F[neuron]), neuron))
    shared, rest = order[: shape.num_shared * m], order[shape.num_shared * m :]
    assert sorted(carving.shared_M.tolist()) == sorted(shared)
    seeds = rest[: shape.num_routed]
    cost = torch.cdist(marks_TF[:, rest].T, marks_TF[:, seeds].T, p=1).repeat_interleave(m, 1)
    rows, columns = linear_sum_assignment(cost.numpy())
    optimum = float(cost[rows, columns].sum())
    got = sum(
        float((marks_TF[:, neuron] - marks_TF[:, seeds[expert]]).abs().sum())
        for expert, members in enumerate(carving.routed_RM.tolist())
        for neuron in members
    )
    assert got == optimum
    assert isinstance(carving.gate, NeuronGate)
    for expert, members in enumerate(carving.routed_RM.tolist()):
        mean_T = marks_TF[:, members].mean(1)
        distances = [float((marks_TF[:, neuron] - mean_T).abs().sum()) for neuron in members]
        ours = [
            neuron
            for neuron in members
            if torch.allclose(carving.gate.gate_RD[expert], unit(case.ffn.gate_FD)[neuron])
            and torch.allclose(carving.gate.up_RD[expert], unit(case.ffn.up_FD)[neuron])
        ]
        assert len(ours) == 1
        assert distances[members.index(ours[0])] == pytest.approx(min(distances), abs=1e-3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("integers", [True, False])
def test_one_sink_per_expert_is_as_good_as_repeated_columns(seed: int, integers: bool) -> None:
    random = generator(seed)
    num_experts, m = 2 + seed % 4, 1 + 3 * seed
    cost_NR = torch.rand(num_experts * m, num_experts, generator=random)
    cost_NR = (cost_NR * 6).floor() if integers else cost_NR
    expert_N = balanced_assignment(-cost_NR)
    assert torch.bincount(expert_N, minlength=num_experts).tolist() == [m] * num_experts
    repeated = cost_NR.repeat_interleave(m, 1)
    rows, columns = linear_sum_assignment(repeated.numpy())
    optimum = float(repeated[rows, columns].double().sum())
    assert float(cost_NR.gather(1, expert_N[:, None]).double().sum()) == pytest.approx(optimum, abs=1e-6)


def test_size_of_inputs_and_rows_does_not_count() -> None:
    """The released code's profile uses directions alone."""
    case = make_case()
    inputs = type(case.inputs)(
        x_TD=case.inputs.x_TD * torch.rand(len(case.inputs.x_TD), 1).add(0.1),
        weights_T=case.inputs.weights_T,
        sequence_T=case.inputs.sequence_T,
    )
    scaled = DenseFFN(
        gate_FD=case.ffn.gate_FD * torch.linspace(0.1, 9, F)[:, None],
        up_FD=case.ffn.up_FD * torch.linspace(5, 0.2, F)[:, None],
        down_DF=case.ffn.down_DF,
    )
    first = carve(case.ffn, case.inputs, SHAPE, generator())
    second = carve(scaled, inputs, SHAPE, generator())
    assert torch.equal(first.routed_RM, second.routed_RM)
