"""Rounding of a router: its loss, its search, and what it leaves alone."""

import math

import pytest
import torch
from torch import nn

from moe.quant.layer import moe_of
from moe.quant.router import CLIPS, GRID, align_router, top_divergence
from moe.routers.topk import TopKRouter
from moe.types import Routing
from tests.quant.scaling.quant_layer_case import LayerCase, make_case

OPTIONS = {"topk": {"name": "topk", "top_k": 2}, "sigmoid": {"name": "noaux_tc", "top_k": 2}}


def router_of(case: LayerCase) -> TopKRouter:
    moe = moe_of(case.layer)
    assert moe is not None and isinstance(moe.router, TopKRouter)
    return moe.router


def loss(router: nn.Module, before: Routing, x_TD: torch.Tensor, num_counted: int) -> float:
    """Both terms, written out token by token."""
    after = router(x_TD)
    total = 0.0
    for token in range(len(x_TD)):
        total += float((after.logits_TE[token] - before.logits_TE[token]).square().sum())
        p_E, q_E = before.probs_TE[token], after.probs_TE[token]
        for expert in p_E.argsort(descending=True)[:num_counted].tolist():
            total += float(p_E[expert]) * math.log(float(p_E[expert]) / float(q_E[expert]))
    return total / len(x_TD)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_best_of_all_ratios_is_chosen(name: str, alpha: float) -> None:
    case = make_case("llama", router=OPTIONS[name])
    router, x_TD = router_of(case), case.inputs.ffn_TD
    assert x_TD is not None
    # Outliers of each row on both sides, which hardly count.
    router.weight.data[:, 3], router.weight.data[:, 4] = 12, -12
    x_TD[:, 3:5] *= 0.001
    weight_ED, before = router.weight.data.clone(), router(x_TD)
    found = align_router(case.layer, case.inputs, clips=CLIPS[::10], alpha=alpha)
    assert found is not None
    num_counted = 2 + int(alpha * (router.num_experts - 2))
    losses = {}
    kept = router.weight.data.clone()
    for clip in CLIPS[::10]:
        router.weight.data.copy_(GRID.round(weight_ED, GRID.scales(weight_ED, clip=clip)).dequantize())
        losses[clip] = loss(router, before, x_TD, num_counted)
    best = min(losses, key=lambda clip: losses[clip])
    assert found.clip == best < 1
    assert math.isclose(found.error + found.divergence, losses[best], rel_tol=1e-3, abs_tol=1e-6)
    assert torch.equal(kept, found.rounded["mlp.router.weight"].dequantize())
    assert found.rounded["mlp.router.weight"].codes.dtype == torch.int8


def test_without_alignment_the_range_is_whole() -> None:
    case = make_case("llama")
    router = router_of(case)
    expected_ED = GRID.nearest(router.weight.data).dequantize()
    found = align_router(case.layer, case.inputs, clips=(1.0,))
    assert found is not None and found.clip == 1
    assert torch.equal(router.weight.data, expected_ED)


def test_divergence_counts_the_largest_only_and_does_not_renormalise() -> None:
    p_TE, q_TE = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.6, 0.2]])
    one, two = 0.5 * math.log(2.5), 0.3 * math.log(0.5)
    for number, expected in ((1, one), (2, one + two), (3, one + two)):
        assert math.isclose(float(top_divergence(p_TE, q_TE, number)), expected, rel_tol=1e-5)
    tiny = top_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 2)
    assert bool(tiny.isfinite())


def test_alpha_counts_more_experts() -> None:
    few, all_experts = (make_case("llama"), make_case("llama"))
    one = align_router(few.layer, few.inputs, clips=(0.5,), alpha=0.0)
    other = align_router(all_experts.layer, all_experts.inputs, clips=(0.5,), alpha=1.0)
    assert one is not None and other is not None
    assert one.error == other.error and one.divergence != other.divergence
    assert other.divergence > 0  # over all experts it is a divergence


def test_layers_without_a_router_to_round() -> None:
    dense = make_case("llama", first_dense_layers=1)
    assert align_router(dense.layer, dense.inputs) is None


def test_tokens_of_the_reserve_do_not_count() -> None:
    one, other = make_case("llama"), make_case("llama")
    assert other.inputs.ffn_TD is not None
    other.inputs.ffn_TD = torch.cat((other.inputs.ffn_TD, 100 * torch.randn(50, 16)))
    first, second = (align_router(case.layer, case.inputs, clips=CLIPS[::20]) for case in (one, other))
    assert first is not None and second is not None
    assert (first.clip, first.error, first.divergence) == (second.clip, second.error, second.divergence)
