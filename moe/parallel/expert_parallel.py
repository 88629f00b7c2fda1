"""Expert parallelism: tokens travel to the ranks that hold their experts, and one row per token and rank comes back.

Each token is sent once to each destination rank, with the list of its experts there and their weights; the destination
runs the ordinary `expert_ffn` on what arrived, which already sums a token's local experts, and returns that sum. At K
experts per token this moves one row where a plain exchange moves one per assignment. Weights travel with autograd, so the
router's gradient is exact.

Every rank takes part in every collective, also with no tokens, no assignments, or none received.

Legend: T tokens, D model, N assignments, E experts, e local experts, W ranks, P (token, rank) pairs sent, R received rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.experts import ExpertBank
from moe.parallel.collectives import Group, all_to_all, exchange_counts
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Who sends what, from one rank's view.

    Attributes:
        order_N: assignments in sending order: by destination rank, then token.
        pair_of_N: row among the pairs of each ordered assignment, counted from its destination's first pair.
        token_ids_P: token of each pair, by destination rank, then token.
        pairs_W, assignments_W: how many of each go to every rank.
    """

    order_N: Tensor
    pair_of_N: Tensor
    token_ids_P: Tensor
    pairs_W: Tensor
    assignments_W: Tensor


def _plan(routing: Routing, num_ranks: int) -> _Plan:
    ranks_N = routing.expert_ids_N // (routing.num_experts // num_ranks)
    keys_N = ranks_N * max(routing.num_tokens, 1) + routing.token_ids_N
    sorted_keys_N, order_N = keys_N.sort(stable=True)
    keys_P, pair_of_N = sorted_keys_N.unique_consecutive(return_inverse=True)
    ranks_P = keys_P // max(routing.num_tokens, 1)
    pairs_W = torch.bincount(ranks_P, minlength=num_ranks)
    first_pair_W = pairs_W.cumsum(0) - pairs_W
    return _Plan(
        order_N=order_N,
        pair_of_N=pair_of_N - first_pair_W[ranks_N[order_N]],
        token_ids_P=keys_P % max(routing.num_tokens, 1),
        pairs_W=pairs_W,
        assignments_W=torch.bincount(ranks_N, minlength=num_ranks),
    )


class ExpertParallelExchange:
    """Runs a layer's experts where they live; the `moe.layer.Exchange` of an expert-parallel model.

    Args:
        group: the expert-parallel process group. Rank r of it holds experts [r * e, (r + 1) * e).
        rank, num_ranks: this process's place in it.
    """

    def __init__(self, group: Group, rank: int, num_ranks: int) -> None:
        self.group, self.rank, self.num_ranks = group, rank, num_ranks

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
        """Weighted sum of each token's experts wherever they live: (T, D) -> (T, D)."""
        plan = _plan(routing, self.num_ranks)
        local_experts = routing.num_experts // self.num_ranks
        counts_W2 = torch.stack([plan.pairs_W, plan.assignments_W], dim=1)
        received_W2 = exchange_counts(counts_W2, self.group)
        (send_P, send_N), (receive_P, receive_N) = counts_W2.T.tolist(), received_W2.T.tolist()

        x_RD = all_to_all(x_TD[plan.token_ids_P], send_P, receive_P, self.group)
        expert_ids_N = routing.expert_ids_N[plan.order_N]
        labels_N2 = torch.stack([plan.pair_of_N, expert_ids_N % local_experts], dim=1)
        labels_N2 = all_to_all(labels_N2, send_N, receive_N, self.group)
        weights_N = all_to_all(routing.weights_N[plan.order_N], send_N, receive_N, self.group)

        first_row_W = received_W2[:, 0].cumsum(0) - received_W2[:, 0]
        y_RD = experts(
            x_RD,
            Routing(
                num_tokens=x_RD.shape[0],
                num_experts=local_experts,
                token_ids_N=labels_N2[:, 0] + first_row_W.repeat_interleave(received_W2[:, 1]),
                expert_ids_N=labels_N2[:, 1].contiguous(),
                weights_N=weights_N,
                counts_E=torch.bincount(labels_N2[:, 1], minlength=local_experts),
            ),
        )
        y_PD = all_to_all(y_RD, receive_P, send_P, self.group)
        # fp32: a token's partial sums from several ranks would otherwise be rounded between additions
        y_TD = torch.zeros(x_TD.shape, device=x_TD.device, dtype=torch.float32)
        return y_TD.index_add(0, plan.token_ids_P, y_PD.float()).to(y_RD.dtype)
