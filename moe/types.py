"""The data types that connect routers to everything else, and the legend of shape suffixes.

A routing is a sparse T x E matrix of combine weights, held as a list of assignments. Every sparse router returns one;
experts, exchanges and losses read nothing else, so none of them knows which router it was.

Shape legend (suffixes name the logical shape of a tensor):
    B batch   L sequence length   T tokens (B * L)   D model width   F expert FFN width
    E experts   e local experts   K top-k   N assignments   S slots   R received rows   W ranks
    G groups of tokens   M tokens of a group
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What is known about a layer's tokens besides their vectors.

    Attributes:
        num_sequences: B; the tokens are B rows of equal length, one after the other.
        keep_T: (T,) bool, False at padding, which is routed but counts in no loss and no statistic; ``None`` keeps all.
        input_ids_T: (T,) int64 vocabulary ids, or ``None`` where they are not known (a layer used alone).
        wants_probs: whether ``Routing.probs_TE`` will be read; a router may give ``Routing.stats`` in its place otherwise.
    """

    num_sequences: int = 1
    keep_T: Tensor | None = None
    input_ids_T: Tensor | None = None
    wants_probs: bool = True


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
class RouterStats:
    """What losses and metrics need of a layer's T x E logits, as sums over the kept tokens.

    Attributes:
        num_kept: () int64, tokens that count.
        counts_E: (E,) int64, their assignments per expert.
        prob_sum_E: (E,) fp32 with gradient, of their probabilities.
        z_sum: () fp32 with gradient, of logsumexp(logits)^2.
        entropy_sum, logit_norm_sum: () fp32 without gradient, of the entropy of the probabilities and the norm of the logits.
    """

    num_kept: Tensor
    counts_E: Tensor
    prob_sum_E: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    logit_norm_sum: Tensor


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
        stats: their sums and those of the logits, where a kernel has them already; read before the two.
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
    stats: RouterStats | None = None
    aux_losses: dict[str, AuxLoss] = field(default_factory=dict)
    output_scale_D: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FFNOptions:
    """How the expert FFN computes, whatever its result.

    Attributes:
        recompute: keep no pre-activation for backward, but make it again there: (N, H) less memory for a third more of the
            forward's arithmetic.
        fp8: round rows and weights to fp8 (e4m3) for the forward's products; backward takes the rounding for the identity.
        main_grads: (E, H, D) and (E, D, F) buffers, fp32 or of the weights' dtype, to which backward adds the weights' gradients;
            the weights themselves then get none.
    """

    recompute: bool = False
    fp8: bool = False
    main_grads: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.recompute and self.fp8:
            raise ValueError(
                "recompute=True with fp8=True would make another pre-activation than the forward's; choose one"
            )


DEFAULT_FFN = FFNOptions()


@dataclass(frozen=True, kw_only=True)
class TopKRule:
    """How logits become K experts and their weights.

    Attributes:
        top_k: K, experts per token.
        score: "softmax" over experts or independent "sigmoid".
        softmax_order: "before" takes the softmax over all experts, then the top-k; "after" takes it over the k chosen logits.
        renormalize: divide the chosen weights by their sum ("after" does so by construction).
        num_groups: split the experts into this many equal groups; 1 is no grouping.
        top_k_groups: groups a token may use; the others are masked before the top-k.
        route_scale: factor on the final weights.
    """

    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    softmax_order: Literal["before", "after"] = "before"
    renormalize: bool = True
    num_groups: int = 1
    top_k_groups: int = 1
    route_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TopKChoices:
    """What `TopKRule` makes of the logits.

    Attributes:
        expert_ids_TK: (T, K) int64, best first; of equal experts the first.
        weights_TK: (T, K) fp32 with gradient.
        counts_E: (E,) int64 assignments per expert, of all tokens.
        stats: sums over the kept tokens.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    stats: RouterStats


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
