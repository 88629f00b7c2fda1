"""SparseMixer (Liu, Gao and Chen 2023, arXiv 2310.00811): sampled top-1 routing with a second-order router gradient.

A token's expert is drawn from a softmax over the experts close to the best one, D ~ p, and weighted by p_D. The loss that
training really minimises is then the expectation

    sum_i p_i f(h_i)  with  h_i = p_i E_i(x)  and f the rest of the network up to the loss,

whose gradient in the logits is sum_i (f'(h_i) h_i + f(h_i) - f(0)) dp_i/dz. Top-k routing drops the difference, because
it would need the loss of a token that no expert processed. SparseMixer replaces it by the midpoint rule f'(h/2) h, which is
exact where f is quadratic: half of the time the weight is halved in the forward pass, and the backward pass is doubled.
Where D is the best expert the weight is never halved (Euler's rule f'(h) h, exact only where f is linear), so that most
tokens train their expert at the weight that evaluation uses.

`Rule`, `near_best`, `masked_softmax` and `choose` also serve SparseMixer-v2 (`sparsemixer_v2`).

Where the released code differs from this file: its gate has a bias; it overwrites the logits with -inf where an expert is
masked (here they stay clean for the z-loss).

Legend: T tokens, D model, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices, straight_through
from moe.routers.base import Router, RouterConfig
from moe.types import NO_INFO, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How f(h) - f(0) is replaced by gradients of f at points between 0 and h.

    Attributes:
        low: the other forward factor besides 1.
        full_chance: P(B = 1), the chance of factor 1.
        gain: factor on the probability's gradient.
    """

    low: float
    full_chance: float
    gain: float


MIDPOINT = Rule(low=1 / 2, full_chance=1 / 2, gain=2.0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One expert per token.

    Attributes:
        ids_T: (T,) int64.
        weights_T: (T,) combine weights; in training their gradient is that of ``gain`` times the probability.
        probs_TE: (T, E) masked probabilities, with gradient.
    """

    ids_T: Tensor
    weights_T: Tensor
    probs_TE: Tensor


@torch.no_grad()
def near_best(logits_TE: Tensor, jitter_eps: float, allowed_TE: Tensor | None = None) -> Tensor:
    """(T, E) bool: experts with (z* - z_i) / max(|z_i|, z*) <= 2 * jitter_eps, z* the largest logit allowed.

    Written without the division: it has no 0 / 0, and all-zero logits keep every expert. The best is always kept.
    """
    if allowed_TE is None:
        allowed_TE = torch.ones_like(logits_TE, dtype=torch.bool)
    best_T1 = logits_TE.masked_fill(~allowed_TE, float("-inf")).amax(-1, keepdim=True)
    return allowed_TE & (best_T1 - logits_TE <= 2 * jitter_eps * torch.maximum(logits_TE.abs(), best_T1))


def masked_softmax(logits_TE: Tensor, kept_TE: Tensor) -> Tensor:
    """Softmax over the kept experts, exactly zero elsewhere; the logits stay as they are."""
    return logits_TE.masked_fill(~kept_TE, float("-inf")).softmax(-1)


def sample(probs_TE: Tensor) -> Tensor:
    """(T,) int64, one expert per token drawn by its probability, by a race of exponential clocks."""
    clocks_TE = torch.empty_like(probs_TE).exponential_().clamp_min(1e-30)
    return (probs_TE.detach() / clocks_TE).argmax(-1)


def rule_weights(probs_T: Tensor, full_T: Tensor, rule: Rule) -> Tensor:
    """Exactly p or, where not ``full_T`` (bool), ``rule.low`` * p in the forward pass; the gradient of ``rule.gain`` * p."""
    forward_T = torch.where(full_T, probs_T, rule.low * probs_T).detach()
    return straight_through(forward_T, rule.gain * probs_T)


def choose(logits_TE: Tensor, kept_TE: Tensor, rule: Rule, training: bool) -> Choice:
    """Draw an expert in training, take the best in evaluation.

    Whenever the best expert is drawn, its factor is 1 (the argmax rule).

    Args:
        logits_TE: (T, E) fp32 with gradient.
        kept_TE: (T, E) bool, at least one expert per token.
        rule: the estimator; evaluation uses neither its factors nor its gain.
        training: whether to draw.
    """
    probs_TE = masked_softmax(logits_TE, kept_TE)
    best_T = logits_TE.detach().masked_fill(~kept_TE, float("-inf")).argmax(-1)
    ids_T = sample(probs_TE) if training else best_T
    weights_T = probs_TE.gather(1, ids_T[:, None])[:, 0]
    if training:
        full_T = (ids_T == best_T) | (torch.rand_like(weights_T) < rule.full_chance)
        weights_T = rule_weights(weights_T, full_T, rule)
    return Choice(ids_T=ids_T, weights_T=weights_T, probs_TE=probs_TE)


@dataclass(frozen=True, kw_only=True)
class SparseMixerConfig(RouterConfig):
    """Options of `SparseMixerRouter`; the defaults are those of the released code.

    Attributes:
        jitter_eps: how far below the best an expert's logit may lie to be drawn, relative to their size; 0 draws the best
            only. The mask does not change when all logits are scaled.
        output_scale: learn a factor per channel on the experts' output (omega in the paper), from ones.
    """

    jitter_eps: float = 0.1
    output_scale: bool = True

    def __post_init__(self) -> None:
        check_jitter_eps(self.jitter_eps)


def check_jitter_eps(value: float) -> None:
    """Raise a ValueError unless ``router.jitter_eps`` is in [0, 1]; at 1 every expert is kept."""
    if not 0 <= value <= 1:
        raise ValueError(f"router.jitter_eps={value} must lie in [0, 1]; the paper's value is 0.1")


class SparseMixerRouter(Router):
    """One expert per token: drawn in training, the best in evaluation, weighted by its masked probability.

    The masked probabilities feed the balance loss, with the drawn experts as load.
    """

    Config = SparseMixerConfig
    config: SparseMixerConfig

    def __init__(self, dim: int, num_experts: int, config: SparseMixerConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.output_scale_D = nn.Parameter(torch.ones(dim)) if config.output_scale else None
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``; the output scale starts at one."""
        nn.init.normal_(self.weight, std=std)
        if self.output_scale_D is not None:
            nn.init.ones_(self.output_scale_D)

    @property
    def mean_experts_per_token(self) -> float:
        """One."""
        return 1

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to one expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            kept_TE = near_best(logits_TE, self.config.jitter_eps)
            choice = choose(logits_TE, kept_TE, MIDPOINT, self.training)
            scale_D = None if self.output_scale_D is None else self.output_scale_D.float()
        return routing_of_choices(
            choice.ids_T[:, None],
            choice.weights_T[:, None],
            self.num_experts,
            logits_TE=logits_TE,
            probs_TE=choice.probs_TE,
            output_scale_D=scale_D,
        )
