"""The two data types that connect routers to everything else, and the legend of shape suffixes.

A routing is a sparse T x E matrix of combine weights, held as a list of assignments. Every sparse router returns one;
experts, exchanges and losses read nothing else, so none of them knows which router it was.

Shape legend (suffixes name the logical shape of a tensor):
    B batch   L sequence length   T tokens (B * L)   D model width   F expert FFN width
    E experts   e local experts   K top-k   N assignments   S slots   R received rows   W ranks
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """One auxiliary loss: what it is, and how much of it is added to the training loss.

    Attributes:
        value: () fp32, the loss as its paper defines it (so 1.0 is perfect balance for the Switch loss).
        coef: factor on ``value`` in the total loss.
    """

    value: Tensor
    coef: float


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A sparse T x E matrix of combine weights as a list of N assignments.

    Attributes:
        num_tokens: T.
        num_experts: E.
        token_ids_N: (N,) int64, the token of each assignment.
        expert_ids_N: (N,) int64, its expert.
        weights_N: (N,) fp32 with gradient, its combine weight.
        counts_E: (E,) int64, assignments that the router asked for, before capacity drops.
        top_k: K when every token has exactly K assignments listed token by token, best first (N = T * K);
            ``None`` when the number of assignments varies from token to token.
        num_dropped: assignments that a capacity limit removed from the list.
        logits_TE: (T, E) fp32 router logits, clean of noise; for the z-loss and metrics.
        probs_TE: (T, E) fp32 router probabilities with gradient, rows summing to one; for balance losses and metrics.
        aux_losses: losses of the router's own, by name.
    """

    num_tokens: int
    num_experts: int
    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    counts_E: Tensor
    top_k: int | None = None
    num_dropped: Tensor | int = 0
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    aux_losses: dict[str, AuxLoss] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SoftRouting:
    """Dense dispatch and combine weights over slots (Soft MoE, Mixture of Tokens).

    Slot s belongs to expert ``s // (S // E)``; its input is a weighted mean of tokens.

    Attributes:
        num_experts: E.
        dispatch_TS: (T, S), weight of each token in each slot's input; columns sum to one.
        combine_TS: (T, S), weight of each slot's output in each token's result; rows sum to one.
        logits_TE: (T, E) fp32 or ``None``; for metrics.
        probs_TE: (T, E) fp32 or ``None``; for balance losses and metrics.
        aux_losses: losses of the router's own, by name.
    """

    num_experts: int
    dispatch_TS: Tensor
    combine_TS: Tensor
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    aux_losses: dict[str, AuxLoss] = field(default_factory=dict)
