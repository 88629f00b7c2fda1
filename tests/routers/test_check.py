"""MOE_CHECK=1: what it finds in a layer's input and in a router's routing, and that it is off otherwise."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers.layer_oracle import make_layer
from helpers.routing import make_routing
from torch import Tensor

from moe.routers import ROUTERS
from moe.routers.check import check_input, check_routing, checks_enabled
from moe.types import Routing, SoftRouting

GOOD = make_routing([0, 1, 2, 0], 3, [0.5, 0.5, 1.0, 0.25], 2)
DISPATCH_GMS = torch.full((1, 2, 6), 0.5)
GOOD_SOFT = SoftRouting(num_experts=3, dispatch_GMS=DISPATCH_GMS, combine_GMS=DISPATCH_GMS)


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


def test_what_keeps_its_promises_passes() -> None:
    check_routing(GOOD, 2, "R")
    check_routing(make_routing([], 3, [], None), 0, "R")
    check_routing(make_routing([2, 0], 3, [0.0, 1.0], None), 2, "R")
    check_routing(GOOD_SOFT, 2, "R")
    check_input(torch.randn(0, 3), "R")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 3}, "it is for 3 tokens, the layer has 2"),
        ({"weights_N": torch.tensor([0.5, float("nan"), 1, 1])}, "a weight is not finite"),
        ({"weights_N": torch.tensor([0.5, float("inf"), 1, 1])}, "a weight is not finite"),
        ({"expert_ids_N": integers(0, 1, 3, 0)}, "expert ids from 0 to 3 where 0 to 2 are valid"),
        ({"expert_ids_N": integers(0, -1, 2, 0)}, "expert ids from -1 to 2 where 0 to 2 are valid"),
        ({"token_ids_N": integers(0, 0, 1, 2)}, "token ids from 0 to 2 where 0 to 1 are valid"),
        ({"counts_E": integers(1, 1, 1)}, "its counts are not those of its list"),
        ({"expert_ids_N": integers(1, 1, 2, 0), "counts_E": integers(1, 2, 1)}, "a token has an expert twice"),
        ({"top_k": 1}, "4 assignments where top_k=1 of 2 tokens makes another number"),
    ],
)
def test_a_broken_routing_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"MOE_CHECK: SomeRouter returned a broken routing: {message}"):
        check_routing(dataclasses.replace(GOOD, **changes), 2, "SomeRouter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dispatch_GMS": DISPATCH_GMS * float("nan")}, "dispatch or combine weights are not finite"),
        ({"combine_GMS": DISPATCH_GMS * float("inf")}, "dispatch or combine weights are not finite"),
        ({"num_experts": 4}, "6 slots for 4 experts"),
    ],
)
def test_a_broken_soft_routing_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_routing(dataclasses.replace(GOOD_SOFT, **changes), 2, "SomeRouter")


@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable(value: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("MOE_CHECK", value)
    assert checks_enabled() == enabled


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_non_finite_input_raises_before_any_router_sees_it(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_CHECK", "1")
    layer = make_layer(num_experts=8, router={"name": name})
    x_TD = torch.randn(4, 6)
    x_TD[2, 3] = x_TD[2, 5] = x_TD[3, 0] = bad
    message = f"the input of {ROUTERS[name].__name__} has 3 non-finite values, first in token 2 of 4; look at what"
    with pytest.raises(ValueError, match=message):
        layer(x_TD)


def test_a_broken_router_is_found_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(router={"name": "topk"})
    route: Callable[..., Routing] = layer.router.forward

    def miscounting(*arguments: object) -> Routing:
        routing = route(*arguments)
        return dataclasses.replace(routing, counts_E=routing.counts_E + 1)

    layer.router.forward = miscounting
    monkeypatch.delenv("MOE_CHECK", raising=False)
    layer(torch.randn(4, 6))
    monkeypatch.setenv("MOE_CHECK", "1")
    with pytest.raises(ValueError, match="TopKRouter returned a broken routing: its counts"):
        layer(torch.randn(4, 6))
