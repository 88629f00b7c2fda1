"""Ground truth for routers that mix tokens: groups as lists, mixtures by plain loops in float64; what `SoftRouting` promises.

Legend: T tokens, B sequences, L their length, D model, E experts, S slots, G groups, M rows of a group.
"""

import torch
from torch import Tensor

from helpers.oracles import dense_ffn
from moe.types import SoftRouting


def group_lists(num_sequences: int, length: int, kind: str, group_size: int) -> list[list[int]]:
    """Tokens of each group; tokens are numbered row by row."""
    rows = [[b * length + p for p in range(length)] for b in range(num_sequences)]
    if kind == "batch":
        return [[token for row in rows for token in row]]
    if kind == "sequence":
        return rows
    starts = range(0, num_sequences, group_size)
    return [[row[p] for row in rows[b : b + group_size]] for p in range(length) for b in starts]


def softmax(values: list[Tensor]) -> list[Tensor]:
    exps = [torch.exp(value - max(v.item() for v in values)) for value in values]
    return [e / sum(exps) for e in exps]


def mixture_layer(
    x_TD: Tensor,
    logits_TS: Tensor,
    groups: list[list[int]],
    keep: list[bool],
    emit: str,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """(T, D) results of an expert layer on weighted means of each group's tokens; differentiable.

    Args:
        emit: "merge", each token's weight in the mean; or "slots", a softmax over all slots.
    """
    assert x_TD.dtype == torch.float64
    rows = [x_TD[t] * 0 for t in range(len(x_TD))]
    num_slots, num_experts = logits_TS.shape[1], len(w_up_EHD)
    for group in groups:
        real = [t for t in group if keep[t]]
        over_slots = {t: softmax([logits_TS[t, s] for s in range(num_slots)]) for t in real}
        for s in range(num_slots if real else 0):
            expert = s // (num_slots // num_experts)
            merge = softmax([logits_TS[t, s] for t in real])
            mean_D = sum(weight * x_TD[t] for weight, t in zip(merge, real, strict=True))
            out_D = dense_ffn(mean_D[None], w_up_EHD[expert], w_down_EDF[expert], activation)[0]
            for weight, t in zip(merge, real, strict=True):
                rows[t] = rows[t] + (weight if emit == "merge" else over_slots[t][s]) * out_D
    return torch.stack(rows)


def weighted_layer(x_TD: Tensor, routing: SoftRouting, w_up_EHD: Tensor, w_down_EDF: Tensor, activation: str) -> Tensor:
    """(T, D) what a layer makes of a given `SoftRouting`, by its definition."""
    dispatch_GMS, combine_GMS = routing.dispatch_GMS.double(), routing.combine_GMS.double()
    num_groups, num_rows, num_slots = dispatch_GMS.shape
    rows = [x_TD[t] * 0 for t in range(len(x_TD))]
    for g in range(num_groups):
        tokens = [g * num_rows + m for m in range(num_rows)]
        if routing.token_ids_GM is not None:
            tokens = routing.token_ids_GM[g].tolist()
        for s in range(num_slots):
            expert = s // (num_slots // routing.num_experts)
            mean_D = sum(dispatch_GMS[g, m, s] * x_TD[t] for m, t in enumerate(tokens))
            out_D = dense_ffn(mean_D[None], w_up_EHD[expert], w_down_EDF[expert], activation)[0]
            for m, t in enumerate(tokens):
                rows[t] = rows[t] + combine_GMS[g, m, s] * out_D
    return torch.stack(rows)


def check_soft_routing(routing: SoftRouting, keep: list[bool], num_experts: int) -> None:
    """Shapes, dtypes, ranges and sums; every real token has one row of its own, and padding no weight anywhere."""
    num_tokens = len(keep)
    assert routing.num_experts == num_experts
    num_groups, num_rows, num_slots = routing.dispatch_GMS.shape
    assert num_slots % num_experts == 0
    for weights_GMS in (routing.dispatch_GMS, routing.combine_GMS):
        assert weights_GMS.shape == (num_groups, num_rows, num_slots)
        assert weights_GMS.dtype == torch.float32
        assert weights_GMS.isfinite().all()
        assert (weights_GMS >= 0).all()
    ids_GM = routing.token_ids_GM
    if ids_GM is None:
        assert num_tokens == num_groups * num_rows
        ids_GM = torch.arange(num_tokens).view(num_groups, num_rows)
    assert ids_GM.shape == (num_groups, num_rows)
    assert ids_GM.dtype == torch.int64
    used_GM = (routing.combine_GMS > 0).any(-1)
    assert sorted(ids_GM[used_GM].tolist()) == [t for t in range(num_tokens) if keep[t]]
    assert not (routing.dispatch_GMS[~used_GM] > 0).any()
    sums_GS = routing.dispatch_GMS.sum(1)
    expected_GS = used_GM.any(1, keepdim=True).float().expand_as(sums_GS)
    torch.testing.assert_close(sums_GS, expected_GS, atol=1e-5, rtol=0)
    assert routing.logits_TE.shape == routing.probs_TE.shape == (num_tokens, num_experts)
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == torch.float32
    assert routing.logits_TE.isfinite().all()
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(num_tokens), atol=1e-5, rtol=0)
