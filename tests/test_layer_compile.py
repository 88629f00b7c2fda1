"""`torch.compile(fullgraph=True)` over a whole layer with the fused kernels: no graph break, same numbers, same statistics."""

import copy

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import assert_same_gradients, gradients, make_layer
from helpers.triton_blocks import small_blocks

from moe.layer import MoELayer, MoESpec

D = 16


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison: a stand-in for the torch module is not traceable
    monkeypatch.setenv("MOE_KERNELS", "triton")
    small_blocks(monkeypatch)
    torch.compiler.reset()


def compiled(layer: MoELayer) -> torch.nn.Module:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")  # inductor would need a C++ compiler


@pytest.mark.parametrize(
    "router", [{"name": "topk"}, {"name": "noaux_tc", "num_groups": 2}, {"name": "switch", "jitter": 0.0}], ids=str
)
def test_training(router: dict) -> None:
    layer = make_layer(D, router=router, num_shared_experts=1, balance=MoESpec().balance)
    other = copy.deepcopy(layer)
    x, dy = torch.randn(2, 9, D), torch.randn(2, 9, D)
    results = []
    for run, own in ((layer, layer), (compiled(other), other)):
        own_x = x.clone().requires_grad_()
        y = run(own_x)
        y.backward(dy)
        results.append((y.detach(), gradients(own, own_x), own.stats))
    (y, expected, stats), (got_y, got, got_stats) = results
    assert_close("y", got_y, y, torch.float32)
    assert_same_gradients(got, expected)
    assert got_stats.num_micro_batches == stats.num_micro_batches == 1
    assert torch.equal(got_stats.counts_E, stats.counts_E)
    assert got_stats.sums.keys() == stats.sums.keys()
    for name, value in stats.sums.items():
        torch.testing.assert_close(got_stats.sums[name], value)


def test_further_steps_are_not_compiled_again() -> None:
    layer = make_layer(D, balance=MoESpec().balance)
    run = compiled(layer)
    for step in range(5):
        if step == 3:  # statistics begin anew, accumulated counts come and go: two graphs in all
            torch._dynamo.config.error_on_recompile = True
        try:
            run(torch.randn(9, D, requires_grad=True)).sum().backward()
        finally:
            torch._dynamo.config.error_on_recompile = False
        layer.finish_step()


def test_inference() -> None:
    layer = make_layer(D, num_shared_experts=1).eval()
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        assert_close("y", compiled(layer)(x), layer(x), torch.float32)


def test_a_copied_layer_has_statistics_of_its_own() -> None:
    layer = make_layer(D)
    other = copy.deepcopy(layer)
    other(torch.randn(4, D, requires_grad=True)).sum().backward()
    assert other.stats.num_micro_batches == 1
    assert layer.stats.num_micro_batches == 0
