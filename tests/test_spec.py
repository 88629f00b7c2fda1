"""`MoESpec`: plain data in and out, and errors that name the field, the value and the fix."""

import json
from typing import Any

import pytest

from moe.layer import MoESpec
from moe.routers import ROUTERS
from moe.routers.balance import BalanceConfig


def test_round_trip_through_json() -> None:
    spec = MoESpec(
        num_experts=16,
        granularity=4,
        num_shared_experts=2,
        shared_gate=True,
        capacity_factor=1.25,
        drop_priority="weight",
        router={"name": "noaux_tc", "top_k": 4, "num_groups": 4, "top_k_groups": 2},
        balance=BalanceConfig(aux_coef=1e-4, aux_scope="sequence", bias_update_rate=1e-3),
    )
    data = json.loads(json.dumps(spec.to_dict()))
    assert MoESpec.from_dict(data) == spec
    assert MoESpec.from_dict({}) == MoESpec()
    assert MoESpec.from_dict({"balance": BalanceConfig(z_coef=0.5)}).balance == BalanceConfig(z_coef=0.5)


def test_from_dict_leaves_its_input_alone() -> None:
    values = {"num_experts": 4, "balance": {"z_coef": 0.1}, "router": {"name": "switch"}}
    spec = MoESpec.from_dict(values)
    assert values == {"num_experts": 4, "balance": {"z_coef": 0.1}, "router": {"name": "switch"}}
    assert spec.balance == BalanceConfig(z_coef=0.1)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_fits_the_default_spec(name: str) -> None:
    assert MoESpec(router={"name": name}).router["name"] == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_expert": 4}, r"moe.num_expert is not an option; did you mean 'num_experts'\?"),
        ({"balance": {"aux_coeff": 1}}, r"moe.balance.aux_coeff is not an option; did you mean 'aux_coef'\?"),
        (
            {"router": {"name": "topk", "topk": 2}},
            r"router.topk is not an option of router 'topk'; did you mean 'top_k",
        ),
        ({"router": {"name": "swich"}}, r"router.name='swich' is unknown; did you mean 'switch'\?"),
        ({"num_experts": 0}, r"moe.num_experts=0 must be at least 1"),
        ({"granularity": 0}, r"moe.granularity=0 must be at least 1"),
        ({"every": 0}, r"moe.every=0 must be at least 1"),
        ({"first_dense_layers": -1}, r"moe.first_dense_layers=-1 must be at least 0"),
        ({"only_layers": []}, r"moe.only_layers=\[\] must be layers from 0, at least one"),
        ({"only_layers": [-1, 2]}, r"moe.only_layers=\[-1, 2\] must be layers from 0"),
        ({"only_layers": [1], "every": 2}, r"moe.only_layers says which layers.*leave out.*moe.every"),
        ({"capacity_factor": 0.0}, r"moe.capacity_factor=0.0 must be positive, or null to drop nothing"),
        ({"eval_capacity_factor": -1.0}, r"moe.eval_capacity_factor=-1.0 must be positive"),
        ({"activation": "relu"}, r"moe.activation='relu' is unknown; use 'swiglu' or 'gelu'"),
        ({"drop_priority": "random"}, r"moe.drop_priority='random' is unknown; use 'choice' or 'weight'"),
        ({"shared_gate": True}, r"moe.shared_gate=true needs moe.num_shared_experts of at least 1"),
        ({"num_experts": 4, "router": {"top_k": 5}}, r"router.top_k=5 is more than num_experts=4"),
        ({"balance": {"bias_update_rate": 0.001}}, r"bias_update_rate=0.001 needs.*selection_bias=true.*noaux_tc"),
    ],
)
def test_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoESpec.from_dict(values)


def test_width_of_an_expert() -> None:
    assert MoESpec(granularity=4).hidden(64) == 16
    assert MoESpec(granularity=4, expert_hidden=5).hidden(63) == 5
    with pytest.raises(ValueError, match=r"moe.granularity=4 does not divide the dense FFN width 63;.*expert_hidden"):
        MoESpec(granularity=4).hidden(63)


def test_which_layers_become_moe() -> None:
    def chosen(**values: Any) -> list[int]:
        return [layer for layer in range(6) if MoESpec.from_dict(values).is_moe_layer(layer)]

    assert chosen() == [0, 1, 2, 3, 4, 5]
    assert chosen(every=2) == [1, 3, 5]
    assert chosen(first_dense_layers=3) == [3, 4, 5]
    assert chosen(first_dense_layers=1, every=2) == [2, 4]
    assert chosen(only_layers=[4, 1]) == [1, 4]


def test_chosen_layers_are_plain_data() -> None:
    """As JSON and back: a model's config.json keeps them."""
    spec = MoESpec.from_dict({"only_layers": [4, 1]})
    assert json.loads(json.dumps(spec.to_dict()))["only_layers"] == [1, 4]
    assert MoESpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
