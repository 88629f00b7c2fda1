"""`gpu-layer` as far as a machine without a GPU can tell: what is compared computes the same, and the counts are right."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_layer.benchmark import BENCHMARK, GATE_CASES, _results, _truth
from benchmarks.gpu_layer.implementations import DENSE, IMPLEMENTATIONS
from benchmarks.gpu_layer.measure import kept_bytes, make_inputs
from benchmarks.gpu_layer.shapes import CASES, ROUTINGS, TARGET, Case, draw_experts
from benchmarks.spec import Options
from benchmarks.verify import relative_error

CPU = torch.device("cpu")
TINY = Case(table="test", num_tokens=40, dim=32, hidden=16, num_experts=6, top_k=3)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != DENSE])
def test_implementations_compute_the_same(name: str, routing: str) -> None:
    inputs = make_inputs(dataclasses.replace(TINY, routing=routing), CPU)
    expected = _truth(inputs)
    for key, value in _results(name, inputs).items():
        assert relative_error(value, expected[key]) < 2e-2, key


def test_the_dense_ffn_has_the_flops_of_the_experts() -> None:
    inputs = make_inputs(TINY, CPU)
    with FlopCounterMode(display=False) as counter:
        IMPLEMENTATIONS[DENSE](inputs)
    assert counter.get_total_flops() == TINY.flop_forward
    assert TARGET.flop_forward == 6 * 32768 * 2048 * 768 * 8


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str) -> None:
    case = dataclasses.replace(TINY, num_tokens=4000, num_experts=32, routing=routing)
    experts_TK = draw_experts(case, CPU, torch.Generator().manual_seed(0))
    assert experts_TK.shape == (4000, 3)
    assert all(len(set(row)) == 3 for row in experts_TK.tolist())
    load_E = torch.bincount(experts_TK.flatten(), minlength=32) / experts_TK.numel()
    expected = {"uniform": 1 / 32, "one expert": 1 / 3}.get(routing)
    assert load_E[0] > 0.1 if expected is None else load_E[0].item() == pytest.approx(expected, abs=0.01)


def test_kept_bytes_are_those_between_forward_and_backward() -> None:
    x = torch.randn(100, 7, requires_grad=True)
    assert kept_bytes(lambda: x.exp().sum(), [x]) == 100 * 7 * 4
    assert kept_bytes(lambda: (x * x).sum(), [x]) == 0, "a leaf is there anyway"


def test_every_published_table_is_there() -> None:
    assert {case.table for case in CASES} == {"A", "B", "C", "F", "G"}
    assert sum(case.table == "A" for case in CASES) == 12
    assert {case.routing for case in CASES} == set(ROUTINGS)
    assert CASES[0] == TARGET
    assert {case.routing for case in GATE_CASES} == set(ROUTINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_numbers() -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA device; its cells stay empty"):
        BENCHMARK.run(Options())
