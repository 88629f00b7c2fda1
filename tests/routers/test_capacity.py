"""Capacity drops: who stays, what it changes, and what it leaves alone."""

import math

import pytest
import torch
from helpers import oracles
from helpers.routing import make_routing
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.layer import MoELayer, MoESpec
from moe.routers.capacity import apply_capacity


def queue(priority: str, top_k: int | None, weights: list[float]) -> list[int]:
    """The order in which assignments come."""
    indices = range(len(weights))
    if priority == "choice" and top_k is not None:
        return sorted(indices, key=lambda n: (n % top_k, n))
    return sorted(indices, key=lambda n: -weights[n])  # stable: ties in list order


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 12),
    num_experts=st.integers(3, 7),
    top_k=st.integers(1, 3),
    variable=st.booleans(),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0]),
    priority=st.sampled_from(["choice", "weight"]),
    seed=st.integers(0, 999),
)
def test_who_stays(
    num_tokens: int, num_experts: int, top_k: int, variable: bool, factor: float, priority: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    skew_E = torch.linspace(1, 4, num_experts)
    ids = (torch.rand(num_tokens, num_experts, generator=generator) * skew_E).topk(top_k).indices.flatten().tolist()
    weights = [round(w, 1) for w in torch.rand(len(ids), generator=generator).tolist()]  # with ties
    routing = make_routing(ids, num_experts, weights, None if variable else top_k)
    capacity = max(1, math.ceil(len(ids) / num_experts * factor))
    order = queue(priority, routing.top_k, routing.weights_N.tolist())
    expected, num_dropped = oracles.kept_by_capacity(ids, num_experts, capacity, order)

    kept = apply_capacity(routing, factor, priority)
    assert kept.num_dropped == num_dropped
    assert kept.expert_ids_N.tolist() == [ids[n] for n in expected]
    assert kept.token_ids_N.tolist() == [routing.token_ids_N[n].item() for n in expected]
    assert torch.equal(kept.weights_N, routing.weights_N[expected])
    assert torch.equal(kept.counts_E, routing.counts_E), "counts are those before drops"
    assert torch.bincount(kept.expert_ids_N, minlength=num_experts).max() <= capacity
    assert kept.top_k == (None if num_dropped else routing.top_k)
    assert (kept.num_tokens, kept.num_experts) == (routing.num_tokens, num_experts)


def test_first_choices_come_before_any_second_choice() -> None:
    routing = make_routing([0, 1, 0, 1, 1, 0, 1, 0], 4, [0.9, 0.1] * 4, top_k=2)  # two first choices of 0, two of 1
    kept = apply_capacity(routing, 1.0, "choice")
    assert kept.token_ids_N.tolist() == [0, 1, 2, 3]
    assert kept.expert_ids_N.tolist() == [0, 0, 1, 1]
    assert kept.num_dropped == 4


def test_the_largest_weights_stay_with_weight_priority() -> None:
    routing = make_routing([0, 0, 0, 0], 2, [0.1, 0.9, 0.5, 0.7], top_k=1)
    assert apply_capacity(routing, 1.0, "weight").token_ids_N.tolist() == [1, 3]
    assert apply_capacity(routing, 1.0, "choice").token_ids_N.tolist() == [0, 1]


def test_nothing_is_dropped_where_there_is_room() -> None:
    routing = make_routing([0, 1, 1, 2, 2, 0], 3, [0.5] * 6, top_k=2)
    assert apply_capacity(routing, 1.0, "choice") is routing
    crowded = make_routing([0] * 6, 3, [0.5] * 6, top_k=None)
    assert apply_capacity(crowded, 3.0, "weight") is crowded


def test_the_gradient_of_the_kept_weights() -> None:
    routing = make_routing([0, 0, 0, 1], 2, [0.1, 0.9, 0.5, 0.7], top_k=1)
    routing.weights_N.requires_grad_()
    apply_capacity(routing, 1.0, "weight").weights_N.sum().backward()
    assert routing.weights_N.grad.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_dropped_token_gets_only_the_shared_experts(num_shared: int) -> None:
    spec = MoESpec(
        num_experts=4,
        expert_hidden=4,
        capacity_factor=0.5,
        num_shared_experts=num_shared,
        router={"name": "switch", "jitter": 0.0},
    )
    layer = MoELayer(8, spec)
    layer.reset_parameters(0.5)
    x_TD = torch.randn(16, 8)
    routing = layer.router(x_TD)
    kept = set(apply_capacity(routing, 0.5, "choice").token_ids_N.tolist())
    dropped = [t for t in range(16) if t not in kept]
    assert dropped
    y_TD = layer(x_TD)
    expected_TD = layer.shared_experts(x_TD) if num_shared else torch.zeros_like(x_TD)
    torch.testing.assert_close(y_TD[dropped], expected_TD[dropped], atol=0, rtol=1e-5)
    assert ((y_TD - expected_TD)[sorted(kept)].abs().amax(-1) > 1e-4).all()
