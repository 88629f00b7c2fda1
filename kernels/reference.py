"""Plain-torch ground truth of every op in `ops.py`: slow, differentiable by autograd, obviously right.

Legend: T tokens, D model, F expert FFN, E experts, K top-k, G groups, N assignments, S slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.types import DEFAULT_FFN, FFNOptions, RouterStats, Routing, TopKChoices, TopKRule


def activate(h_NH: Tensor, activation: str) -> Tensor:
    """Activation of the pre-activation ``h_NH``: (N, 2F) -> (N, F) for "swiglu" (gate first, then up), (N, F) for "gelu".

    SwiGLU is arXiv 2002.05202 eq. 6 without biases; GELU is the exact (erf) one.
    """
    if activation == "swiglu":
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        return F.silu(gate_NF) * up_NF
    if activation == "gelu":
        return F.gelu(h_NH)
    raise ValueError(f"activation={activation!r} is unknown; use 'swiglu' or 'gelu'")


class _AddTo(torch.autograd.Function):
    """A tensor whose gradient is added to a buffer and goes no further."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(gradient)
        return None, None


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Both stacked matrices, (E, H, D) and (E, D, F)."""

    up_EHD: Tensor
    down_EDF: Tensor


def with_main_grads(w_up_EHD: Tensor, w_down_EDF: Tensor, options: FFNOptions) -> ExpertWeights:
    """The weights, with gradients that go to ``options.main_grads`` if there are any."""
    if options.main_grads is None:
        return ExpertWeights(up_EHD=w_up_EHD, down_EDF=w_down_EDF)
    main_up, main_down = options.main_grads
    return ExpertWeights(up_EHD=_AddTo.apply(w_up_EHD, main_up), down_EDF=_AddTo.apply(w_down_EDF, main_down))


def expert_ffn(
    x_TD: Tensor,
    routing: Routing,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    options: FFNOptions = DEFAULT_FFN,
) -> Tensor:
    """Sum over assignments of weight * expert(token), one assignment's expert at a time; see `ops.expert_ffn`.

    It keeps what autograd keeps, whatever ``options.recompute`` says.
    """
    weights = with_main_grads(w_up_EHD, w_down_EDF, options)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in range(w_up_EHD.shape[0]):
        picked_n = (routing.expert_ids_N == expert).nonzero().squeeze(-1)
        token_ids_n = routing.token_ids_N[picked_n]
        a_nF = activate(x_TD[token_ids_n] @ weights.up_EHD[expert].T, activation)
        out_nD = (a_nF @ weights.down_EDF[expert].T).to(y_TD.dtype) * routing.weights_N[picked_n, None].to(y_TD.dtype)
        y_TD = y_TD.index_add(0, token_ids_n, out_nD)
    return y_TD.to(x_TD.dtype)


def route_topk(
    logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None = None, keep_T: Tensor | None = None
) -> TopKChoices:
    """See `ops.route_topk`; float64 logits are treated in float64."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = probs_TE = logits_TE.softmax(-1)
    if rule.score == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    ids_TK = _choose(logits_TE.detach() if bias_E is None else scores_TE.detach() + bias_E, rule, bias_E is not None)
    if rule.score == "softmax" and rule.softmax_order == "after":
        weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
        if rule.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    counts_TE = torch.zeros_like(logits_TE, dtype=torch.int64).scatter_(1, ids_TK, 1)
    kept_T = torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device) if keep_T is None else keep_T
    entropies_T = -(probs_TE * probs_TE.clamp_min(1e-20).log()).sum(-1)
    stats = RouterStats(
        num_kept=kept_T.sum(),
        counts_E=counts_TE[kept_T].sum(0),
        prob_sum_E=probs_TE[kept_T].sum(0),
        z_sum=logits_TE.logsumexp(-1)[kept_T].square().sum(),
        entropy_sum=entropies_T[kept_T].sum().detach(),
        logit_norm_sum=logits_TE.norm(dim=-1)[kept_T].sum().detach(),
    )
    weights_TK = weights_TK * rule.route_scale
    return TopKChoices(expert_ids_TK=ids_TK, weights_TK=weights_TK, counts_E=counts_TE.sum(0), stats=stats)


def _choose(keys_TE: Tensor, rule: TopKRule, biased: bool) -> Tensor:
    """(T, K) ids of the best experts in the best groups; see `ops.route_topk`."""
    keys_TE = keys_TE.clamp_min(
        torch.finfo(keys_TE.dtype).min
    )  # an expert of a kept group comes before all of the others
    if rule.num_groups > 1:
        num_tokens, num_experts = keys_TE.shape
        keys_TGe = keys_TE.view(num_tokens, rule.num_groups, num_experts // rule.num_groups)
        best_TGb = keys_TGe.sort(-1, descending=True).values[..., : 2 if biased else 1]
        kept_TG = _best(best_TGb.sum(-1), rule.top_k_groups)
        dropped_TG = torch.ones_like(best_TGb[..., 0], dtype=torch.bool).scatter_(1, kept_TG, False)
        keys_TE = keys_TGe.masked_fill(dropped_TG[..., None], float("-inf")).view_as(keys_TE)
    return _best(keys_TE, rule.top_k)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row, in order, of equal ones the first: `torch.topk` leaves that open."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
