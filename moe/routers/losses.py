"""Balance losses and routing statistics as pure functions: no state, no communication.

What other ranks know (global counts) comes in as an argument. Means over tokens come from a routing's sums where a kernel has
made them (`RouterStats`), else from its T x E matrices; from there on there is one formula. Every balance loss here is 1 at
perfect balance and E when one expert gets everything, for any K: papers and libraries differ by a factor K, so coefficients do
not carry over blindly.

Legend: T tokens, E experts, B sequences, N assignments.
"""

import torch
from torch import Tensor

from moe.types import RouterStats, Routing, SoftRouting


def count_assignments(
    expert_ids_N: Tensor, num_experts: int, token_ids_N: Tensor | None = None, keep_T: Tensor | None = None
) -> Tensor:
    """(E,) int64 assignments per expert, of the tokens where ``keep_T`` (bool) is set if it is given.

    Not `torch.bincount`: that waits for the device to say how large its result is.
    """
    kept_N = torch.ones_like(expert_ids_N)
    if keep_T is not None:
        assert token_ids_N is not None
        kept_N = keep_T[token_ids_N].to(torch.int64)
    return expert_ids_N.new_zeros(num_experts).scatter_add_(0, expert_ids_N, kept_N)


def masked_mean(values_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """Mean over the first dimension, of the rows where ``keep_T`` is set; 0 when there are none."""
    if keep_T is None:
        return values_T.sum(0) / max(values_T.shape[0], 1)
    weights_T = keep_T.to(values_T.dtype).view(-1, *[1] * (values_T.dim() - 1))
    return (values_T * weights_T).sum(0) / weights_T.sum().clamp_min(1)


def switch_loss(probs_TE: Tensor, counts_E: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """`switch_loss_of_mean` of the kept tokens' mean probabilities."""
    return switch_loss_of_mean(masked_mean(probs_TE, keep_T), counts_E)


def switch_loss_of_mean(probs_E: Tensor, counts_E: Tensor) -> Tensor:
    """Switch balance loss E * sum_i f_i P_i (arXiv 2101.03961 eq. 4), with f_i = counts_i / sum(counts).

    ``counts_E`` may cover more tokens than the mean ``probs_E`` does (other ranks, earlier micro-batches): the loss is linear
    in P, so the mean of the ranks' losses with global counts is the loss of the global batch (arXiv 2501.11873).
    No gradient passes through the counts.
    """
    fraction_E = counts_E.to(probs_E.dtype) / counts_E.sum().clamp_min(1)
    return probs_E.numel() * (fraction_E * probs_E).sum()


def sequence_loss(
    probs_TE: Tensor, expert_ids_N: Tensor, token_ids_N: Tensor, num_sequences: int, keep_T: Tensor | None = None
) -> Tensor:
    """Mean over sequences of the Switch loss of each one (arXiv 2412.19437 eq. 17-20); T = num_sequences * L.

    Sequences without a kept token do not count.
    """
    num_tokens, num_experts = probs_TE.shape
    length = num_tokens // num_sequences
    kept_T = probs_TE.new_ones(num_tokens) if keep_T is None else keep_T.to(probs_TE.dtype)
    cells_N = (token_ids_N // length) * num_experts + expert_ids_N
    counts_BE = probs_TE.new_zeros(num_sequences * num_experts)
    counts_BE = counts_BE.index_add(0, cells_N, kept_T[token_ids_N]).view(num_sequences, num_experts)
    fraction_BE = counts_BE / counts_BE.sum(-1, keepdim=True).clamp_min(1)
    kept_B = kept_T.view(num_sequences, length).sum(1)
    sums_BE = (probs_TE * kept_T[:, None]).view(num_sequences, length, num_experts).sum(1)
    mean_BE = sums_BE / kept_B[:, None].clamp_min(1)
    return num_experts * (fraction_BE * mean_BE).sum() / (kept_B > 0).sum().clamp_min(1)


def z_loss(logits_TE: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """Router z-loss, the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 eq. 5)."""
    return masked_mean(logits_TE.logsumexp(-1).square(), keep_T)


def squared_variation(values_E: Tensor) -> Tensor:
    """CV^2: population variance over squared mean (arXiv 1701.06538 eq. 7 and 11)."""
    return values_E.var(correction=0) / values_E.mean().square().clamp_min(1e-10)


def entropy(probs_TE: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """Mean entropy of the router's distribution over experts, in nats; at most ln E."""
    return masked_mean(-(probs_TE * probs_TE.clamp_min(1e-20).log()).sum(-1), keep_T)


def _stats(routing: Routing | SoftRouting) -> RouterStats | None:
    return routing.stats if isinstance(routing, Routing) else None


def balance_loss(
    routing: Routing, counts_E: Tensor, keep_T: Tensor | None, num_sequences: int | None = None
) -> Tensor | None:
    """`switch_loss` of the kept tokens, or `sequence_loss` of so many sequences; ``None`` for routers without probabilities."""
    if num_sequences is None and routing.stats is not None:
        return switch_loss_of_mean(routing.stats.prob_sum_E / routing.stats.num_kept.clamp_min(1), counts_E)
    if routing.probs_TE is None:
        return None
    if num_sequences is None:
        return switch_loss(routing.probs_TE, counts_E, keep_T)
    return sequence_loss(routing.probs_TE, routing.expert_ids_N, routing.token_ids_N, num_sequences, keep_T)


def mean_z(routing: Routing | SoftRouting, keep_T: Tensor | None) -> Tensor | None:
    """`z_loss` of the kept tokens; ``None`` for routers without logits."""
    if stats := _stats(routing):
        return stats.z_sum / stats.num_kept.clamp_min(1)
    return None if routing.logits_TE is None else z_loss(routing.logits_TE, keep_T)


@torch.no_grad()
def observations(routing: Routing | SoftRouting, keep_T: Tensor | None) -> dict[str, Tensor]:
    """Mean "entropy" and "logit_norm" of the kept tokens, () each, as far as the router has what they need."""
    if stats := _stats(routing):
        num_kept = stats.num_kept.clamp_min(1)
        return {"entropy": stats.entropy_sum / num_kept, "logit_norm": stats.logit_norm_sum / num_kept}
    found = {}
    if routing.probs_TE is not None:
        found["entropy"] = entropy(routing.probs_TE, keep_T)
    if routing.logits_TE is not None:
        found["logit_norm"] = masked_mean(routing.logits_TE.norm(dim=-1), keep_T)
    return found


def load_fractions(counts_E: Tensor) -> Tensor:
    """(E,) fp32 share of the assignments that each expert received; zeros where nothing was assigned."""
    counts_E = counts_E.detach().float()
    return counts_E / counts_E.sum().clamp_min(1e-20)


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = max_i c_i / mean(c) - 1 (arXiv 2408.15664 eq. 4): 0 is balanced, or nothing was assigned; E - 1 is collapse."""
    counts_E = counts_E.detach().float()
    mean = counts_E.mean()
    return torch.where(mean > 0, counts_E.max() / mean.clamp_min(1e-20) - 1, torch.zeros_like(mean))
