"""Ground truth in float64 by plain Python loops; nothing here calls the code under test.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), E experts, K top-k, N assignments.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _ffn(x_D: Tensor, w_up_HD: Tensor, w_down_DF: Tensor, activation: str) -> Tensor:
    h_H = w_up_HD @ x_D
    if activation == "swiglu":
        gate_F, up_F = h_H[: len(h_H) // 2], h_H[len(h_H) // 2 :]
        a_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
    else:
        a_F = 0.5 * h_H * (1 + torch.erf(h_H / math.sqrt(2)))
    return w_down_DF @ a_F


def expert_ffn(
    x_TD: Tensor,
    token_ids: Sequence[int],
    expert_ids: Sequence[int],
    weights_N: Tensor,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Sum over assignments of weight * expert(token), one assignment after the other; differentiable."""
    assert x_TD.dtype == torch.float64
    rows = [x_TD[t] * 0 for t in range(x_TD.shape[0])]
    for n, (t, e) in enumerate(zip(token_ids, expert_ids, strict=True)):
        rows[t] = rows[t] + weights_N[n] * _ffn(x_TD[t], w_up_EHD[e], w_down_EDF[e], activation)
    return torch.stack(rows) if rows else x_TD * 0


def dense_ffn(x_TD: Tensor, w_up_HD: Tensor, w_down_DF: Tensor, activation: str) -> Tensor:
    """The same FFN on every token."""
    return torch.stack([_ffn(x_D, w_up_HD, w_down_DF, activation) for x_D in x_TD])


def softmax_topk(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[list[int], Tensor]:
    """Expert ids token by token, best first, and their weights (T * K), differentiable."""
    ids, weights = [], []
    for logits_E in logits_TE:
        exp_E = torch.exp(logits_E - logits_E.max().detach())
        probs_E = exp_E / exp_E.sum()
        best = sorted(range(len(probs_E)), key=lambda e: -probs_E[e].item())[:top_k]
        total = sum(probs_E[e] for e in best) if renormalize else 1.0
        ids += best
        weights += [probs_E[e] / total for e in best]
    return ids, torch.stack(weights)


def kept_by_capacity(
    expert_ids: Sequence[int], num_experts: int, capacity: int, order: Sequence[int]
) -> tuple[list[int], int]:
    """Assignments that find room when they come in ``order``, in list order; and how many do not."""
    used, kept = [0] * num_experts, []
    for n in order:
        if used[expert_ids[n]] < capacity:
            used[expert_ids[n]] += 1
            kept.append(n)
    return sorted(kept), len(expert_ids) - len(kept)


def group_limited_choice(
    scores: Sequence[float], num_groups: int, top_k_groups: int, top_k: int, num_best: int
) -> list[int]:
    """DeepSeek's choice for one token: best groups by the sum of their ``num_best`` experts, then the best experts."""
    size = len(scores) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    value = [sum(sorted((scores[e] for e in group), reverse=True)[:num_best]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: -value[g])[:top_k_groups]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: -scores[e])[:top_k]


def switch_loss(probs_TE: Tensor, counts: Sequence[float], keep: Sequence[bool] | None = None) -> Tensor:
    """E * sum_i f_i P_i, over the tokens of ``keep``."""
    num_tokens, num_experts = probs_TE.shape
    rows = [t for t in range(num_tokens) if keep is None or keep[t]]
    loss, total = probs_TE.sum() * 0, max(sum(counts), 1)
    for e in range(num_experts):
        loss = loss + counts[e] / total * sum(probs_TE[t, e] for t in rows) / max(len(rows), 1)
    return num_experts * loss


def sequence_loss(
    probs_TE: Tensor, expert_ids: Sequence[int], token_ids: Sequence[int], num_sequences: int, keep: Sequence[bool]
) -> Tensor:
    """Mean over sequences of the Switch loss of the sequence alone."""
    length, num_experts = probs_TE.shape[0] // num_sequences, probs_TE.shape[1]
    values = []
    for b in range(num_sequences):
        span = range(b * length, (b + 1) * length)
        counts = [0] * num_experts
        for t, e in zip(token_ids, expert_ids, strict=True):
            if t in span and keep[t]:
                counts[e] += 1
        values.append(switch_loss(probs_TE[span.start : span.stop], counts, [keep[t] for t in span]))
    return sum(values) / num_sequences
