"""Which tokens each expert is calibrated on: those that the router sends it, and more where these are few.

An expert with less than r K N / E of N calibration tokens, r times its share of a balanced load, also gets tokens of a reserve of
text: first those that the router sends it, in their order, then, where they do not suffice, those with its highest router score,
from both texts (EAQuant, arXiv 2506.13329, "calibration data balance"; there the reserve has no end, and no second step is needed).
With r = 0 experts get what the router sends, which may be nothing.

Legend: N calibration tokens, R tokens of the reserve, T = N + R, D model, E experts, K experts per token, n tokens of one expert.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.quant.walk import Routed


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """What each expert is calibrated on.

    Attributes:
        target: tokens that an expert should have at least; 0 without balancing.
        ffn_TD: inputs of the MoE: of the N calibration tokens, then of those of the reserve that some expert uses.
        tokens_e: rows of it for each expert, (n,) int64; first the calibration tokens that the router sent.
        weights_e: (n,) fp32 combine weights; the router's score for tokens that it sent elsewhere.
        routed: tokens of each expert that the router sent: of the calibration text.
        reserve: the same, of the reserve.
        scored: tokens that it got by their score.
    """

    target: int
    ffn_TD: Tensor
    tokens_e: list[Tensor] = field(default_factory=list)
    weights_e: list[Tensor] = field(default_factory=list)
    routed: list[int] = field(default_factory=list)
    reserve: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)


def expert_tokens(ffn_TD: Tensor, routed: Routed, num_calibration: int, ratio: float) -> ExpertTokens:
    """Choose tokens for every expert of a layer.

    Args:
        ffn_TD: inputs of the MoE, calibration tokens first.
        routed: their routing.
        num_calibration: N.
        ratio: r.
    """
    num_experts, num_tokens = routed.num_experts, len(ffn_TD)
    is_calibration = routed.token_ids_N < num_calibration
    target = min(math.ceil(ratio * int(is_calibration.sum()) / num_experts), num_tokens)
    chosen = ExpertTokens(target=target, ffn_TD=ffn_TD)
    for expert in range(num_experts):
        mine = (routed.expert_ids_N == expert).nonzero()[:, 0]
        mine = mine[routed.token_ids_N[mine].argsort(stable=True)]
        num_routed = int((routed.token_ids_N[mine] < num_calibration).sum())
        mine = mine[: max(num_routed, target)]
        tokens_n, weights_n = routed.token_ids_N[mine], routed.weights_N[mine]
        chosen.routed.append(num_routed)
        chosen.reserve.append(len(mine) - num_routed)
        more_n = _best_of_the_rest(routed.scores_TE, expert, tokens_n, target - len(mine))
        if more_n is not None:
            assert routed.scores_TE is not None
            tokens_n = torch.cat((tokens_n, more_n))
            weights_n = torch.cat((weights_n, routed.scores_TE[more_n, expert]))
        chosen.scored.append(len(tokens_n) - len(mine))
        chosen.tokens_e.append(tokens_n)
        chosen.weights_e.append(weights_n)
    return _without_unused(chosen, num_calibration)


def _best_of_the_rest(scores_TE: Tensor | None, expert: int, taken_n: Tensor, number: int) -> Tensor | None:
    """The tokens with the highest scores for an expert among those that it has not; ``None`` where none are wanted or known."""
    if number <= 0 or scores_TE is None:
        return None
    scores_T = scores_TE[:, expert].clone()
    scores_T[taken_n] = -math.inf
    return scores_T.argsort(descending=True, stable=True)[:number]


def _without_unused(chosen: ExpertTokens, num_calibration: int) -> ExpertTokens:
    """With the rows of the reserve that some expert uses."""
    used_T = torch.zeros(len(chosen.ffn_TD), dtype=torch.bool, device=chosen.ffn_TD.device)
    used_T[:num_calibration] = True
    for tokens_n in chosen.tokens_e:
        used_T[tokens_n] = True
    if used_T.all():
        return chosen
    place_T = used_T.cumsum(0) - 1
    return ExpertTokens(
        target=chosen.target,
        ffn_TD=chosen.ffn_TD[used_T],
        tokens_e=[place_T[tokens_n] for tokens_n in chosen.tokens_e],
        weights_e=chosen.weights_e,
        routed=chosen.routed,
        reserve=chosen.reserve,
        scored=chosen.scored,
    )
