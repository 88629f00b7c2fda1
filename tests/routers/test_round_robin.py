"""Round robin: who gets which token, by hand."""

import pytest
import torch
from helpers.routing import make_router


def test_tokens_are_dealt_out_in_turn() -> None:
    routing = make_router(4, 3, name="round_robin")(torch.randn(5, 4))
    assert routing.expert_ids_N.tolist() == [0, 1, 2, 0, 1]
    assert routing.weights_N.tolist() == [1.0] * 5
    routing = make_router(4, 5, name="round_robin", top_k=2, offset=3)(torch.randn(4, 4))
    assert routing.expert_ids_N.tolist() == [3, 4, 0, 1, 2, 3, 4, 0]
    assert routing.weights_N.tolist() == [0.5] * 8


def test_the_load_is_even() -> None:
    assert make_router(4, 8, name="round_robin", top_k=3)(torch.randn(64, 4)).counts_E.tolist() == [24] * 8


def test_there_is_nothing_to_learn() -> None:
    router = make_router(4, 3, name="round_robin")
    assert not list(router.parameters()) and not list(router.buffers())
    assert router(torch.randn(2, 4)).aux_losses == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"top_k": 4}, "router.top_k=4 is more than num_experts=3; lower it or add experts"),
        ({"offset": -1}, "router.offset=-1 must not be negative"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, 3, name="round_robin", **options)
