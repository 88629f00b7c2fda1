"""What a layer does between optimizer steps: the bias moves once, statistics start anew."""

import pytest
import torch
from helpers.layer_oracle import make_layer
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from moe.layer import MoELayer
from moe.routers.balance import BalanceConfig
from moe.routers.losses import max_violation

D, E, T = 6, 4, 20
BIAS = BalanceConfig(aux_coef=0.1, bias_update_rate=0.25)


def biased_layer() -> MoELayer:
    return make_layer(D, router={"name": "noaux_tc"}, balance=BIAS)


def batch() -> torch.Tensor:
    return torch.randn(T, D, requires_grad=True)


def expected_bias(counts_E: torch.Tensor) -> torch.Tensor:
    return 0.25 * torch.sign(counts_E.float().mean() - counts_E)


def test_finish_step_moves_the_bias_by_the_counts_of_the_step() -> None:
    layer = biased_layer()
    for _ in range(3):
        layer(batch()).sum().backward()
    counts_E = layer.stats.counts_E.clone()
    assert (layer.router.bias_E == 0).all(), "moved before the step"
    assert torch.equal(layer.finish_step().counts_E, counts_E)
    assert torch.equal(layer.router.bias_E, expected_bias(counts_E))
    assert layer.router.bias_E.abs().max() > 0
    layer.finish_step()  # without a batch: nothing moves
    assert torch.equal(layer.router.bias_E, expected_bias(counts_E))


def test_the_bias_moves_by_the_counts_of_all_ranks() -> None:
    layer = biased_layer()
    others_E = torch.tensor([1000, 0, 0, 0])
    layer.reduce_counts = lambda numbers: numbers + pad(others_E, (0, len(numbers) - E))  # tokens are summed along
    layer(batch()).sum().backward()
    stats = layer.finish_step()
    assert torch.equal(layer.router.bias_E, expected_bias(stats.counts_E + others_E))
    assert stats.counts_E.sum() == T * 2


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant"])
def test_an_optimizer_step_is_noticed_without_a_training_loop(mode: str) -> None:
    layer = biased_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)

    def micro_batch() -> None:
        x_TD = batch()
        y_TD = layer(x_TD) if mode == "plain" else checkpoint(layer, x_TD, use_reentrant=mode == "reentrant")
        y_TD.square().sum().backward()

    micro_batch()
    micro_batch()
    assert layer.stats.num_micro_batches == 2, "accumulation is no step"
    counts_E = layer.stats.counts_E.clone()
    optimizer.step()
    optimizer.zero_grad()
    micro_batch()
    assert layer.stats.num_micro_batches == 1
    assert layer.stats.counts_E.sum() == T * 2
    assert torch.equal(layer.router.bias_E, expected_bias(counts_E)), "moved once"


def test_a_checkpointed_forward_routes_twice_alike_after_a_step() -> None:
    """The bias moves before the first forward of a step, not between it and its recomputation."""
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer = biased_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            x_TD = batch()
            y_TD = checkpoint(layer, x_TD, use_reentrant=False) if checkpointed else layer(x_TD)
            y_TD.square().sum().backward()
            optimizer.step()
        gradients.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_kind_of_optimizer_is_noticed(options: dict) -> None:
    layer = biased_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, **options)
    for _ in range(2):
        layer(batch()).sum().backward()
        optimizer.step()
    assert layer.stats.num_micro_batches == 1


def test_a_training_loop_and_the_notice_do_not_both_act() -> None:
    layer = biased_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    for _ in range(2):
        layer.router.bias_E.zero_()
        layer(batch()).sum().backward()
        optimizer.step()
        stats = layer.finish_step()
        assert stats.num_micro_batches == 1
        assert torch.equal(layer.router.bias_E, expected_bias(stats.counts_E))


def test_evaluation_between_steps_disturbs_nothing() -> None:
    layer = biased_layer()
    layer(batch()).sum().backward()
    layer.eval()(batch())
    layer.train()
    layer(batch()).sum().backward()
    assert layer.stats.num_micro_batches == 2
    assert (layer.router.bias_E == 0).all()


def test_without_a_rate_the_bias_stays() -> None:
    layer = make_layer(D, router={"name": "noaux_tc"})
    layer(batch()).sum().backward()
    layer.finish_step()
    assert (layer.router.bias_E == 0).all()


def test_training_balances_the_load() -> None:
    """End to end: the balance loss spreads out a skewed router; nothing else here does."""
    worst = {}
    for coef in (0.0, 1.0):
        torch.manual_seed(1)
        layer = make_layer(D, balance=BalanceConfig(aux_coef=coef))
        with torch.no_grad():
            layer.router.weight[0] += 0.5
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.01)
        late_E = torch.zeros(E)
        for step in range(150):
            optimizer.zero_grad()
            (layer((torch.randn(64, D) + 1).requires_grad_()) * 0).sum().backward()
            optimizer.step()
            counts_E = layer.finish_step().counts_E
            assert counts_E is not None
            late_E += counts_E * (step >= 120)
        worst[coef] = max_violation(late_E).item()
    assert worst[1.0] < 0.3
    assert worst[0.0] > 0.8
