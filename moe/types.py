"""The data types that connect routers to everything else, and the legend of shape suffixes.

A routing is a sparse T x E matrix of combine weights, held as a list of assignments. Every sparse router returns one;
experts, exchanges and losses read nothing else, so none of them knows which router it was.

Shape legend (suffixes name the logical shape of a tensor):
    B batch   L sequence length   T tokens (B * L)   D model width   F expert FFN width
    E experts   e local experts   K top-k   N assignments   S slots   R received rows   W ranks
    G groups of tokens   M tokens of a group
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What is known about a layer's tokens besides their vectors.

    Attributes:
        num_sequences: B; the tokens are B rows of equal length, one after the other.
        keep_T: (T,) bool, False at padding, which is routed but counts in no loss and no statistic; ``None`` keeps all.
        input_ids_T: (T,) int64 vocabulary ids, or ``None`` where they are not known (a layer used alone).
    """

    num_sequences: int = 1
    keep_T: Tensor | None = None
    input_ids_T: Tensor | None = None


NO_INFO = TokenInfo()


@dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """One auxiliary loss: what it is, and how much of it is added to the training loss.

    Attributes:
        value: () fp32, the loss as its paper defines it (so 1.0 is perfect balance for the Switch loss).
        coef: factor on ``value`` in the total loss; a tensor where the router adapts it.
    """

    value: Tensor
    coef: float | Tensor


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
        output_scale_D: (D,) learned factor on the routed experts' output, or ``None``.
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
    output_scale_D: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SoftRouting:
    """Dense dispatch and combine weights between the tokens of a group and its slots (Soft MoE, Mixture of Tokens).

    Every group has S slots of its own. Slot s belongs to expert ``s // (S // E)``; its input is a weighted sum of the
    group's tokens, and a token's result a weighted sum of its group's slots.

    Attributes:
        num_experts: E.
        dispatch_GMS: (G, M, S) fp32, weight of each token in each slot's input; sums to one over M.
        combine_GMS: (G, M, S) fp32, weight of each slot's output in each token's result.
        token_ids_GM: (G, M) int64, the token of each row; ``None`` where groups are tokens in order (T = G * M). A row
            whose weights are all zero is padding and may name any token; results of rows of the same token add up.
        logits_TE: (T, E) fp32 or ``None``; for metrics.
        probs_TE: (T, E) fp32 or ``None``; for balance losses and metrics.
        aux_losses: losses of the router's own, by name.
    """

    num_experts: int
    dispatch_GMS: Tensor
    combine_GMS: Tensor
    token_ids_GM: Tensor | None = None
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    aux_losses: dict[str, AuxLoss] = field(default_factory=dict)
