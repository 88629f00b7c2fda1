"""Exact balanced assignment of tokens to experts, as BASE layers train with (Lewis et al., arXiv 2103.16716).

Maximise the sum of the tokens' scores at their experts, under loads that differ by at most one. It is a transportation problem
with few sinks, solved by successive shortest paths over the experts: give every token the expert it likes best at some
prices, then, while a load is out of bounds, move tokens along the chain of experts that costs least. The result is optimal
for any prices; good ones, from Sinkhorn iterations, leave few tokens to be moved. BASE's released code bids in an auction
whose steps are a fraction of the score's range, and stops after a fixed number of rounds; this one is exact to rounding.

Legend: T tokens, E experts.
"""

import itertools
import math

import torch
from torch import Tensor

TOLERANCE = 1e-10  # gains below this share of the scores' range do not count; rounding errors stay below it


@torch.no_grad()
def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """(T,) int64 expert of each token: floor(T / E) or ceil(T / E) tokens for each expert, at the largest total score.

    Args:
        scores_TE: (T, E), finite. The search runs on the CPU in float64; the result is on the device of the scores.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_TE.device)
    scaled_TE = scores_TE.double()
    spread = (scaled_TE.max() - scaled_TE.min()).clamp_min(torch.finfo(torch.float64).tiny)
    scaled_TE = (scaled_TE - scaled_TE.min()) / spread
    expert_ids_T = (scaled_TE - _starting_prices(scaled_TE.float())).argmax(-1)
    return _Rebalancing(scaled_TE.cpu(), expert_ids_T.cpu()).run().to(scores_TE.device)


def sinkhorn_prices(
    logits_GME: Tensor, real_GM: Tensor | None = None, tolerance: float = 1e-4, max_iterations: int = 100
) -> Tensor:
    """(G, 1, E) fp32 price of each expert: softmax(logits - price) / M is the Sinkhorn plan, whose columns sum to 1 / E.

    Rows and columns of exp(logits) are scaled in turn (in logarithms, so that logits of any size stay finite), until no
    price moves by more than ``tolerance``. Waits for the device in every iteration.

    Args:
        logits_GME: (G, M, E) finite.
        real_GM: (G, M) bool, the rows to balance; the others do not count.
    """
    logits_GME = logits_GME.detach().float()
    num_groups, num_rows, num_experts = logits_GME.shape
    prices_G1E = logits_GME.new_zeros(num_groups, 1, num_experts)
    if logits_GME.numel() == 0:
        return prices_G1E
    log_target: Tensor | float = math.log(num_rows / num_experts)
    if real_GM is not None:
        real_GM = real_GM | ~real_GM.any(1, keepdim=True)  # nothing but padding: any prices do
        log_target = (real_GM.sum(1).float() / num_experts).log()[:, None, None]
    for _ in range(max_iterations):
        log_plan_GME = (logits_GME - prices_G1E).log_softmax(-1)
        if real_GM is not None:
            log_plan_GME = log_plan_GME.masked_fill(~real_GM[..., None], float("-inf"))
        change_G1E = log_plan_GME.logsumexp(1, keepdim=True) - log_target
        prices_G1E = prices_G1E + change_G1E
        if bool(change_G1E.abs().max() <= tolerance):
            break
    return prices_G1E


def _starting_prices(scores_TE: Tensor) -> Tensor:
    """(E,) prices at which the best experts of the tokens are nearly balanced; scores lie in [0, 1]."""
    prices_E = scores_TE.new_zeros(scores_TE.shape[1])
    for sharpness in (30.0, 300.0):  # Sinkhorn is slow on sharp scores unless it starts well
        logits_TE = (scores_TE - prices_E) * sharpness
        prices_E = prices_E + sinkhorn_prices(logits_TE[None], tolerance=1e-2, max_iterations=10).view(-1) / sharpness
    return prices_E.double()


class _Rebalancing:
    """Moves tokens until the loads are balanced.

    Args:
        scores_TE: (T, E) float64 in [0, 1] on the CPU.
        expert_ids_T: (T,) where the tokens are; moving them along a cycle of experts must not be a gain.
    """

    def __init__(self, scores_TE: Tensor, expert_ids_T: Tensor) -> None:
        num_tokens, num_experts = scores_TE.shape
        self.scores_TE, self.expert_ids_T, self.num_experts = scores_TE, expert_ids_T, num_experts
        self.least, self.most = num_tokens // num_experts, -(-num_tokens // num_experts)
        self.loads_E = torch.bincount(expert_ids_T, minlength=num_experts)
        self.moves_EE = torch.stack([self._cheapest_moves(expert) for expert in range(num_experts)])

    def run(self) -> Tensor:
        """(T,) the best balanced assignment.

        Relieving an overfull expert, and filling one below its floor, count for more than any path can cost: so one
        search finds the cheapest way from an expert that may give to one that may take, the urgent ones first.
        """
        never, urgent = float("inf"), -(4.0 * self.num_experts + 1)
        while True:
            give_E = torch.full((self.num_experts,), never, dtype=torch.float64)
            take_E = give_E.clone()
            give_E[self.loads_E > self.least], take_E[self.loads_E < self.most] = 0.0, 0.0
            give_E[self.loads_E > self.most], take_E[self.loads_E < self.least] = urgent, urgent
            costs_E, previous_E = _shortest_paths(give_E, self.moves_EE)
            last = int((costs_E + take_E).argmin())
            if not float(costs_E[last] + take_E[last]) < -TOLERANCE:
                return self.expert_ids_T
            path = [last]
            while (before := previous_E[path[0]]) >= 0:
                path.insert(0, before)
                if before in path[1:]:  # what rounding left unnoticed has added up to a gain: take that first
                    path = path[: path.index(before, 1) + 1]
                    break
            self._push(path)

    def _cheapest_moves(self, expert: int) -> Tensor:
        """(E,) least loss of score at which one of an expert's tokens moves to each other expert."""
        members_nE = self.scores_TE[self.expert_ids_T == expert]
        if len(members_nE) == 0:
            return torch.full((self.num_experts,), float("inf"), dtype=torch.float64)
        loss_E = (members_nE[:, expert : expert + 1] - members_nE).min(0).values
        loss_E[expert] = float("inf")
        return loss_E

    def _push(self, path: list[int]) -> None:
        """Move one token from each expert of the path, or cycle, to the next, or as many as cost the same and have room."""
        first, last = path[0], path[-1]
        spare = self.loads_E[first] - (self.most if self.loads_E[first] > self.most else self.least)
        room = (self.least if self.loads_E[last] < self.least else self.most) - self.loads_E[last]
        if first == last:
            spare = room = self.loads_E[first]  # a cycle changes no load
        tokens = []
        for here, there in itertools.pairwise(path):
            members_n = (self.expert_ids_T == here).nonzero()[:, 0]
            loss_n = self.scores_TE[members_n, here] - self.scores_TE[members_n, there]
            tokens.append(members_n[loss_n <= self.moves_EE[here, there]])
        amount = min(int(spare), int(room), *(len(tied_n) for tied_n in tokens))
        for there, tied_n in zip(path[1:], tokens, strict=True):
            self.expert_ids_T[tied_n[:amount]] = there
        self.loads_E[first] -= amount
        self.loads_E[last] += amount
        for expert in path:
            self.moves_EE[expert] = self._cheapest_moves(expert)


def _shortest_paths(start_E: Tensor, moves_EE: Tensor) -> tuple[Tensor, list[int]]:
    """Bellman-Ford over the experts: (E,) cost of the cheapest path to each, and its last expert but one (-1: none)."""
    costs_E, previous_E = start_E, torch.full(start_E.shape, -1)
    for _ in range(len(start_E)):
        through_E, by_E = (costs_E[:, None] + moves_EE).min(0)
        better_E = through_E < costs_E - TOLERANCE
        if not bool(better_E.any()):
            break
        costs_E, previous_E = torch.where(better_E, through_E, costs_E), torch.where(better_E, by_E, previous_E)
    return costs_E, previous_E.tolist()
