"""The auxiliary-loss-free bias: its update, and that it balances a skewed stream."""

import pytest
import torch
from helpers.routing import make_router

from moe.routers.balance import BalanceConfig, update_bias
from moe.routers.losses import max_violation


def test_update_is_the_sign_of_the_missing_load() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.25, 1.0])
    update_bias(bias_E, torch.tensor([10, 4, 4, 0]), 0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.125, 1.125]
    update_bias(bias_E, torch.tensor([5, 5, 7, 3]), 0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.25, 1.25], "an average load does not move the bias"


def test_update_stays_outside_autograd() -> None:
    bias_E = torch.zeros(2, requires_grad=True)
    update_bias(bias_E, torch.tensor([1, 0]), 0.1)
    assert bias_E.grad_fn is None


@pytest.mark.parametrize("options", [{}, {"num_groups": 4, "top_k_groups": 2}], ids=["flat", "groups"])
def test_bias_balances_a_skewed_stream(options: dict) -> None:
    router = make_router(8, 8, logits=True, name="noaux_tc", **options)
    x_TD = torch.randn(2048, 8) + torch.linspace(-1.5, 1.5, 8)
    violations = []
    for _ in range(400):
        counts_E = router(x_TD).counts_E
        violations.append(max_violation(counts_E).item())
        update_bias(router.bias_E, counts_E, 2e-3)
    assert violations[0] > 1
    assert max(violations[-20:]) < 0.1
    assert violations[50] < violations[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_scope": "batch"}, r"balance.aux_scope='batch' is unknown; use one of \('micro_batch', 'sequence'"),
        ({"aux_coef": -1.0}, r"balance.aux_coef=-1.0 must not be negative"),
        ({"z_coef": -0.1}, r"balance.z_coef=-0.1"),
        ({"bias_update_rate": -0.1}, r"balance.bias_update_rate=-0.1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**options)
