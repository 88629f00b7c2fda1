"""Balance losses and statistics: known values, gradients, scopes and masks."""

import math

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close

from moe.routers import losses

T, E = 24, 8


def random_probs(num_tokens: int = T) -> torch.Tensor:
    return torch.randn(num_tokens, E).softmax(-1)


def random_assignments(num_tokens: int = T, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and expert ids."""
    expert_ids_TK = torch.rand(num_tokens, E).topk(top_k).indices
    return torch.arange(num_tokens).repeat_interleave(top_k), expert_ids_TK.reshape(-1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_at_balance_and_e_at_collapse(top_k: int) -> None:
    balanced = losses.switch_loss(torch.full((T, E), 1 / E), torch.full((E,), T * top_k // E))
    assert balanced.item() == pytest.approx(1)
    collapsed_TE = torch.zeros(T, E)
    collapsed_TE[:, :top_k] = 1 / top_k
    counts_E = torch.zeros(E, dtype=torch.int64)
    counts_E[:top_k] = T
    assert losses.switch_loss(collapsed_TE, counts_E).item() == pytest.approx(E / top_k)
    one_hot_TE = torch.zeros(T, E)
    one_hot_TE[:, 3] = 1
    counts_E = torch.zeros(E, dtype=torch.int64)
    counts_E[3] = T * top_k
    assert losses.switch_loss(one_hot_TE, counts_E).item() == pytest.approx(E)

    tokens_N = torch.arange(T).repeat_interleave(top_k)
    spread_N = (torch.arange(T * top_k)) % E
    for probs_TE, experts_N, expected in (
        (torch.full((T, E), 1 / E), spread_N, 1.0),
        (one_hot_TE, torch.full((T * top_k,), 3), E),
    ):
        value = losses.sequence_loss(probs_TE, experts_N, tokens_N, num_sequences=3)
        assert value.item() == pytest.approx(expected)


def test_switch_loss_against_the_loop() -> None:
    probs_TE = random_probs().requires_grad_()
    probs64_TE = probs_TE.detach().double().requires_grad_()
    counts_E = torch.tensor([5, 0, 1, 7, 3, 0, 2, 6])
    value = losses.switch_loss(probs_TE, counts_E)
    expected = oracles.switch_loss(probs64_TE, counts_E.tolist())
    value.backward()
    expected.backward()
    assert_close("value", value, expected, torch.float32)
    assert_close("dprobs", probs_TE.grad, probs64_TE.grad, torch.float32)
    torch.testing.assert_close(probs_TE.grad, (E * counts_E / 24 / T).expand(T, E))  # only through P


def test_mean_of_ranks_with_global_counts_is_the_loss_of_everything() -> None:
    probs_TE = random_probs()
    tokens_N, experts_N = random_assignments()
    counts_E = losses.count_assignments(experts_N, E, tokens_N, None)
    whole = losses.switch_loss(probs_TE, counts_E)
    ranks = [losses.switch_loss(part, counts_E) for part in probs_TE.chunk(4)]
    torch.testing.assert_close(torch.stack(ranks).mean(), whole)
    local = [
        losses.switch_loss(probs_TE[r * 6 : r * 6 + 6], torch.bincount(experts_N[r * 12 : r * 12 + 12], minlength=E))
        for r in range(4)
    ]
    assert abs(torch.stack(local).mean() - whole) > 1e-2, "the scope makes no difference here"


def test_count_assignments() -> None:
    tokens_N, experts_N = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 3, 1, 1, 0])
    counts_E = losses.count_assignments(experts_N, 5, tokens_N, None)
    assert counts_E.tolist() == [1, 3, 0, 1, 0]
    kept_E = losses.count_assignments(experts_N, 5, tokens_N, torch.tensor([True, False, True]))
    assert kept_E.tolist() == [1, 2, 0, 1, 0]
    assert counts_E.dtype == kept_E.dtype == torch.int64


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_loss_against_the_loop(masked: bool) -> None:
    probs_TE = random_probs().requires_grad_()
    probs64_TE = probs_TE.detach().double().requires_grad_()
    tokens_N, experts_N = random_assignments()
    keep_T = torch.rand(T) < 0.6 if masked else torch.ones(T, dtype=torch.bool)
    value = losses.sequence_loss(probs_TE, experts_N, tokens_N, 4, keep_T if masked else None)
    expected = oracles.sequence_loss(probs64_TE, experts_N.tolist(), tokens_N.tolist(), 4, keep_T.tolist())
    value.backward()
    expected.backward()
    assert_close("value", value, expected, torch.float32)
    assert_close("dprobs", probs_TE.grad, probs64_TE.grad, torch.float32)
    assert (probs_TE.grad[~keep_T] == 0).all()


def test_sequence_loss_of_one_sequence_is_the_switch_loss() -> None:
    probs_TE, (tokens_N, experts_N) = random_probs(), random_assignments()
    counts_E = torch.bincount(experts_N, minlength=E)
    torch.testing.assert_close(
        losses.sequence_loss(probs_TE, experts_N, tokens_N, 1), losses.switch_loss(probs_TE, counts_E)
    )


def test_sequence_loss_with_a_variable_number_of_experts() -> None:
    probs_TE = random_probs(6)
    tokens_N, experts_N = torch.tensor([0, 0, 0, 2, 5]), torch.tensor([1, 2, 3, 1, 7])
    value = losses.sequence_loss(probs_TE, experts_N, tokens_N, 2)
    expected = oracles.sequence_loss(probs_TE.double(), experts_N.tolist(), tokens_N.tolist(), 2, [True] * 6)
    assert_close("value", value, expected, torch.float32)


def test_z_loss_value_and_gradient() -> None:
    assert losses.z_loss(torch.zeros(T, E)).item() == pytest.approx(math.log(8) ** 2)
    assert losses.z_loss(torch.zeros(T, E)).item() == pytest.approx(4.3241, abs=1e-4)
    logits_TE = (3 * torch.randn(T, E)).requires_grad_()
    losses.z_loss(logits_TE).backward()
    with torch.no_grad():
        expected_TE = 2 / T * logits_TE.logsumexp(-1, keepdim=True) * logits_TE.softmax(-1)
    torch.testing.assert_close(logits_TE.grad, expected_TE)
    assert losses.z_loss(torch.full((2, E), 1e4)).isfinite()


def test_padding_counts_as_if_it_were_not_there() -> None:
    """Each masked function equals the same one on the kept tokens; masked tokens get zero gradient."""
    keep_T = torch.rand(T) < 0.5
    logits_TE = torch.randn(T, E)
    tokens_N, experts_N = random_assignments()
    kept_N = keep_T[tokens_N]
    counts_E = losses.count_assignments(experts_N, E, tokens_N, keep_T)
    assert torch.equal(counts_E, torch.bincount(experts_N[kept_N], minlength=E))
    for function in (
        lambda z, keep: losses.z_loss(z, keep),
        lambda z, keep: losses.switch_loss(z.softmax(-1), counts_E, keep),
        lambda z, keep: losses.entropy(z.softmax(-1), keep),
    ):
        padded_TE = logits_TE.clone()
        padded_TE[~keep_T] = 1e3  # whatever stands there
        padded_TE.requires_grad_()
        short_TE = logits_TE[keep_T].requires_grad_()
        value, expected = function(padded_TE, keep_T), function(short_TE, None)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        torch.testing.assert_close(padded_TE.grad[keep_T], short_TE.grad)
        assert (padded_TE.grad[~keep_T] == 0).all()


def test_nothing_but_padding_and_nothing_at_all() -> None:
    none_T, no_counts_E = torch.zeros(T, dtype=torch.bool), torch.zeros(E, dtype=torch.int64)
    tokens_N, experts_N = random_assignments()
    empty = torch.zeros(0, dtype=torch.int64)
    for value in (
        losses.switch_loss(random_probs(), no_counts_E, none_T),
        losses.z_loss(torch.randn(T, E), none_T),
        losses.sequence_loss(random_probs(), experts_N, tokens_N, 4, none_T),
        losses.entropy(random_probs(), none_T),
        losses.switch_loss(torch.zeros(0, E), no_counts_E),
        losses.z_loss(torch.zeros(0, E)),
        losses.sequence_loss(torch.zeros(0, E), empty, empty, 1),
    ):
        assert value.item() == 0


def test_squared_variation() -> None:
    assert losses.squared_variation(torch.full((E,), 3.0)).item() == 0
    assert losses.squared_variation(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    one_E = torch.zeros(E)
    one_E[2] = 17
    assert losses.squared_variation(one_E).item() == pytest.approx(E - 1)
    assert losses.squared_variation(torch.zeros(E)).item() == 0


def test_entropy_bounds() -> None:
    assert losses.entropy(torch.full((T, E), 1 / E)).item() == pytest.approx(math.log(E))
    assert losses.entropy(torch.eye(E)).item() == pytest.approx(0, abs=1e-6)
    assert 0 < losses.entropy(random_probs()).item() < math.log(E)


def test_max_violation() -> None:
    assert losses.max_violation(torch.full((E,), 5)).item() == 0
    assert losses.max_violation(torch.tensor([12, 0, 0, 0])).item() == pytest.approx(3)
    assert losses.max_violation(torch.tensor([3, 1, 2, 2])).item() == pytest.approx(0.5)
    assert losses.max_violation(torch.zeros(E, dtype=torch.int64)).isfinite()


def test_load_fractions_and_max_violation() -> None:
    counts_E = torch.tensor([1, 2, 5, 0])
    load_E = losses.load_fractions(counts_E)
    assert load_E.tolist() == pytest.approx([0.125, 0.25, 0.625, 0.0])
    assert losses.max_violation(load_E).item() == pytest.approx(1.5)
    assert losses.max_violation(counts_E).item() == pytest.approx(1.5)
    assert losses.max_violation(torch.full((8,), 3.0)).item() == 0
    assert losses.max_violation(torch.tensor([0.0, 0.0, 7.0])).item() == pytest.approx(2)
    nothing = losses.load_fractions(torch.zeros(4, dtype=torch.int64))
    assert nothing.tolist() == [0, 0, 0, 0] and losses.max_violation(nothing).item() == 0
    many = losses.load_fractions(torch.tensor([2**40, 2**40], dtype=torch.int64))
    assert many.tolist() == [0.5, 0.5]
