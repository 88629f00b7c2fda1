"""Groups of tokens against plain lists; softmax over the real rows of a group."""

import warnings

import pytest
import torch
from helpers.soft import group_lists
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.routers.groups import check_group, describe_leak, group_tokens, softmax_over_rows, warn_of_extra_work
from moe.types import TokenInfo

KINDS = ["batch", "sequence", "position"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_sequences=st.integers(1, 7),
    length=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
    group_size=st.integers(1, 8),
    padded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_against_lists(num_sequences: int, length: int, kind: str, group_size: int, padded: bool, seed: int) -> None:
    num_tokens = num_sequences * length
    keep_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6 if padded else None
    groups = group_tokens(num_tokens, TokenInfo(num_sequences=num_sequences, keep_T=keep_T), kind, group_size)
    expected = group_lists(num_sequences, length, kind, group_size)
    assert groups.num_groups == len(expected)
    assert groups.num_rows == max(map(len, expected), default=groups.num_rows)

    ids_GM1 = groups.gather(torch.arange(num_tokens)[:, None])
    assert ids_GM1.shape == (groups.num_groups, groups.num_rows, 1)
    if groups.token_ids_GM is None:
        assert expected == [ids_GM1[g, :, 0].tolist() for g in range(len(expected))]
    else:
        assert torch.equal(groups.token_ids_GM, ids_GM1[..., 0])
    for g, tokens in enumerate(expected):
        assert ids_GM1[g, : len(tokens), 0].tolist() == tokens
        real = [True] * groups.num_rows if groups.real_GM is None else groups.real_GM[g].tolist()
        kept = [True] * len(tokens) if keep_T is None else keep_T[tokens].tolist()
        assert real == kept + [False] * (groups.num_rows - len(tokens))

    values_GMX = torch.randn(groups.num_groups, groups.num_rows, 3)
    values_TX = groups.scatter(values_GMX)
    assert values_TX.shape == (num_tokens, 3)
    for g, tokens in enumerate(expected):
        for m, token in enumerate(tokens):
            assert torch.equal(values_TX[token], values_GMX[g, m])


@pytest.mark.parametrize(
    ("kind", "num_sequences", "length", "group_size"),
    [("batch", 3, 4, 2), ("sequence", 3, 4, 2), ("position", 6, 1, 3), ("position", 2, 1, 8), ("position", 1, 5, 8)],
)
def test_groups_in_order_need_no_ids(kind: str, num_sequences: int, length: int, group_size: int) -> None:
    groups = group_tokens(num_sequences * length, TokenInfo(num_sequences=num_sequences), kind, group_size)
    assert groups.token_ids_GM is None
    assert groups.rows_T is None
    assert groups.real_GM is None


def test_generation_with_a_cache_groups_the_prompts() -> None:
    """One token per prompt: 5 prompts in groups of 3 are 3 and 2, filled up with a row that is not real."""
    groups = group_tokens(5, TokenInfo(num_sequences=5), "position", 3)
    assert groups.token_ids_GM.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert groups.real_GM.tolist() == [[True] * 3, [True, True, False]]


def test_sequences_of_unequal_length_are_no_batch() -> None:
    with pytest.raises(AssertionError, match="7 tokens are not 2 sequences"):
        group_tokens(7, TokenInfo(num_sequences=2), "position", 2)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_softmax_over_the_real_rows(scale: float) -> None:
    logits_GMX = (scale * torch.randn(4, 5, 3)).requires_grad_()
    real_GM = torch.rand(4, 5) < 0.5
    real_GM[0] = False
    real_GM[1] = True
    weights_GMX = softmax_over_rows(logits_GMX, real_GM)
    for g in range(4):
        rows = real_GM[g].nonzero()[:, 0]
        expected_GMX = torch.zeros(5, 3)
        expected_GMX[rows] = logits_GMX[g, rows].detach().softmax(0)
        assert torch.equal(weights_GMX[g], expected_GMX)
    with torch.autograd.set_detect_anomaly(True):
        (softmax_over_rows(logits_GMX, real_GM) * torch.randn(4, 5, 3)).sum().backward()
    assert logits_GMX.grad.isfinite().all()
    assert not logits_GMX.grad[~real_GM].any()
    assert torch.equal(softmax_over_rows(logits_GMX, None), logits_GMX.softmax(1))


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match=r"router.group='row' is unknown; use one of 'batch', 'sequence', 'position'"):
        check_group("row", 4)
    with pytest.raises(ValueError, match=r"router.group='batch' is unknown; use one of 'sequence'"):
        check_group("batch", 4, ("sequence",))
    with pytest.raises(ValueError, match=r"router.group_size=0 must be at least 1"):
        check_group("position", 0)
    assert "router.group=position" in describe_leak("soft", "sequence")


def test_only_much_more_work_than_asked_is_worth_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"'soft' evaluates 8 experts per token .* ask for 1, .* have 2 tokens only; fix"
    ):
        warn_of_extra_work("soft", 8.0, 1.0, 2, "fix")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_extra_work("soft", 1.5, 1.0, 2, "fix")
