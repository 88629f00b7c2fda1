"""Calibration balance: every expert gets its target, from the right text and in the right order."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.quant.balance import ExpertTokens, expert_tokens
from moe.quant.walk import Routed


def routed_of(scores_TE: Tensor, top_k: int) -> Routed:
    """The top-k of scores, listed best first."""
    weights_TK, experts_TK = scores_TE.topk(top_k, dim=-1)
    return Routed(
        token_ids_N=torch.arange(len(scores_TE)).repeat_interleave(top_k),
        expert_ids_N=experts_TK.flatten(),
        weights_N=weights_TK.flatten(),
        scores_TE=scores_TE,
        num_tokens=len(scores_TE),
        num_experts=scores_TE.shape[1],
    )


def oracle(scores_TE: Tensor, top_k: int, num_calibration: int, ratio: float) -> list[list[int]]:
    """Tokens of each expert, by loops over lists."""
    num_tokens, num_experts = scores_TE.shape
    chosen = [set(row.topk(top_k).indices.tolist()) for row in scores_TE]
    target = min(math.ceil(ratio * top_k * num_calibration / num_experts), num_tokens)
    found = []
    for expert in range(num_experts):
        mine = [token for token in range(num_calibration) if expert in chosen[token]]
        for token in range(num_calibration, num_tokens):
            if len(mine) < target and expert in chosen[token]:
                mine.append(token)
        rest = [token for token in range(num_tokens) if token not in mine]
        rest.sort(key=lambda token: (-float(scores_TE[token, expert]), token))
        found.append(mine + rest[: max(target - len(mine), 0)])
    return found


def original(found: ExpertTokens, ffn_TD: Tensor) -> list[list[int]]:
    """Token numbers in the whole text, from the rows themselves; each row has its number in it."""
    return [found.ffn_TD[tokens_n, 0].long().tolist() for tokens_n in found.tokens_e]


@settings(deadline=None, max_examples=60)
@given(
    num_calibration=st.integers(1, 12),
    num_reserve=st.integers(0, 12),
    num_experts=st.integers(1, 6),
    ratio=st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_tokens_are_those_of_plain_loops(
    num_calibration: int, num_reserve: int, num_experts: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    num_tokens = num_calibration + num_reserve
    generator = torch.Generator().manual_seed(seed)
    scores_TE = (torch.randn(num_tokens, num_experts, generator=generator) + torch.arange(num_experts)).softmax(-1)
    ffn_TD = torch.arange(num_tokens)[:, None].float().expand(-1, 3).contiguous()
    found = expert_tokens(ffn_TD, routed_of(scores_TE, top_k), num_calibration, ratio)
    expected = oracle(scores_TE, top_k, num_calibration, ratio)
    assert original(found, ffn_TD) == expected
    assert torch.equal(found.ffn_TD[:num_calibration], ffn_TD[:num_calibration])
    assert len(found.ffn_TD) == num_calibration + len({t for e in expected for t in e if t >= num_calibration})
    for expert, tokens in enumerate(expected):
        parts = (found.routed[expert], found.reserve[expert], found.scored[expert])
        assert sum(parts) == len(tokens)
        assert len(tokens) >= found.target
        torch.testing.assert_close(found.weights_e[expert], scores_TE[tokens, expert])


def test_without_balance_experts_get_what_the_router_sends() -> None:
    """One of them nothing; the captured tensor itself is used, not a copy."""
    scores_TE = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0]])
    ffn_TD = torch.randn(3, 2)
    found = expert_tokens(ffn_TD, routed_of(scores_TE, 1), 3, 0.0)
    assert [tokens.tolist() for tokens in found.tokens_e] == [[0, 1], [2], []]
    assert found.routed == [2, 1, 0]
    assert found.ffn_TD is ffn_TD


def test_a_router_without_scores_gives_what_the_text_has() -> None:
    """Of the reserve, and no more."""
    scores_TE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    routed = routed_of(scores_TE, 1)
    bare = Routed(**(vars(routed) | {"scores_TE": None}))
    found = expert_tokens(torch.randn(4, 2), bare, 2, 2.0)
    assert [tokens.tolist() for tokens in found.tokens_e] == [[0, 1], [2, 3]]
    assert (found.target, found.scored) == (2, [0, 0])
