"""Independent random gates with a straight-through gradient (Bengio, Leonard and Courville 2013, arXiv 1308.3432).

Every expert has a gate of its own; the number of experts varies from token to token and may be zero:

    a = x W + b,  h_i ~ Bernoulli(sigmoid(a_i)),  y = sum_i h_i E_i(x)

The straight-through estimator copies the gradient of the random output to its argument: dL/da_i := dL/dh_i ("identity"),
or dL/da_i := sigmoid'(a_i) dL/dh_i ("sigmoid"), which makes it exact in expectation for a loss linear in y.

dL/dh_i is <dL/dy, E_i(x)>, which needs the expert's output. With ``backward="all"`` every expert runs on every token,
those behind a closed gate with weight 0, so that all gates learn; this costs a dense layer. With "chosen" only open gates
learn from the loss: closed ones have no gradient, as those of experts that top-k routing leaves out.

Rate loss: the sum over experts of KL(rho || mean_t sigmoid(a_ti)) with rho = target_k / E. It is 0 when every expert is
open for a share rho of the tokens, so it sets the compute and balances the load. The logarithms are taken of the mean, not
the mean of the logarithms: single tokens may be as certain as they like. For equal a its gradient is mean - rho, which does
not vanish for gates that are shut (a squared error's would). The gates' bias starts at sigmoid(b) = rho.

Legend: T tokens, D model, E experts.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix, straight_through
from moe.routers.base import Router, RouterConfig
from moe.types import NO_INFO, AuxLoss, Routing, TokenInfo


@dataclass(frozen=True, kw_only=True)
class StochasticConfig(RouterConfig):
    """Options of `StochasticRouter`.

    Attributes:
        target_k: desired mean number of open gates per token; need not be whole.
        straight_through: the gradient of a gate's logit, "identity" or "sigmoid" (times sigmoid').
        backward: the gates that learn from the loss, "chosen" or "all" (at the cost of all experts in training).
        evaluation: "expected" weighs every expert by sigmoid(a), "threshold" opens the gates of sigmoid(a) > 1/2.
        rate_coef: factor on the rate loss; 0 turns it off. ``balance.aux_coef`` has no effect.
    """

    target_k: float = 2.0
    straight_through: Literal["identity", "sigmoid"] = "identity"
    backward: Literal["chosen", "all"] = "chosen"
    evaluation: Literal["expected", "threshold"] = "expected"
    rate_coef: float = 1e-2

    def __post_init__(self) -> None:
        if self.target_k <= 0:
            raise ValueError(f"router.target_k={self.target_k} must be positive")
        for name, values in (
            ("straight_through", ("identity", "sigmoid")),
            ("backward", ("chosen", "all")),
            ("evaluation", ("expected", "threshold")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"router.{name}={getattr(self, name)!r} is unknown; use {values[0]!r} or {values[1]!r}"
                )
        if self.rate_coef < 0:
            raise ValueError(f"router.rate_coef={self.rate_coef} must not be negative")


class StochasticRouter(Router):
    """Bernoulli gates, one per expert."""

    Config = StochasticConfig
    config: StochasticConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: StochasticConfig) -> None:
        super().__init__(dim, num_experts, config)
        if config.target_k >= num_experts:
            raise ValueError(
                f"router.target_k={config.target_k} must be below num_experts={num_experts}; lower it or add experts"
            )
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``; the bias opens a share target_k / E of the gates."""
        nn.init.normal_(self.weight, std=std)
        rate = self.config.target_k / self.num_experts
        nn.init.constant_(self.bias, math.log(rate / (1 - rate)))

    @property
    def mean_experts_per_token(self) -> float:
        """What the rate loss aims at in training; every expert where gates that are closed learn too."""
        return self.num_experts if self.config.backward == "all" else self.config.target_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Open every gate at random in training; deterministic in evaluation. A token may have no expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
            listed_TE, aux_losses = None, {}
            if self.training:
                open_TE = torch.rand_like(logits_TE) < logits_TE.detach().sigmoid()
                weights_TE = gate_weights(logits_TE, open_TE, self.config.straight_through)
                listed_TE = torch.ones_like(open_TE) if self.config.backward == "all" else open_TE
                rate = self.config.target_k / self.num_experts
                aux_losses["rate"] = AuxLoss(value=rate_loss(logits_TE, rate, info.keep_T), coef=self.config.rate_coef)
            elif self.config.evaluation == "expected":
                weights_TE = logits_TE.sigmoid()
            else:
                weights_TE = gate_weights(logits_TE, logits_TE > 0, self.config.straight_through)
            # sigmoid(a_i) / sum_j sigmoid(a_j), without 0 / 0 where all gates are shut
            probs_TE = F.logsigmoid(logits_TE).softmax(-1)
        return routing_of_matrix(weights_TE, listed_TE, logits_TE=logits_TE, probs_TE=probs_TE, aux_losses=aux_losses)


def gate_weights(logits_TE: Tensor, open_TE: Tensor, kind: Literal["identity", "sigmoid"]) -> Tensor:
    """Exactly 0 or 1 in the forward pass; its gradient in the logit is 1, or sigmoid'."""
    slope_TE = logits_TE if kind == "identity" else logits_TE.sigmoid()
    return straight_through(open_TE.to(logits_TE.dtype), slope_TE)


def rate_loss(logits_TE: Tensor, rate: float, keep_T: Tensor | None = None) -> Tensor:
    """Sum over experts of KL(Bernoulli(rate) || Bernoulli(mean over tokens of sigmoid(a))); () fp32, 0 without tokens.

    From logsumexps of log-sigmoids: finite, and with a gradient, also where every gate is shut.
    """
    if keep_T is None:
        keep_T = logits_TE.new_ones(logits_TE.shape[0], dtype=torch.bool)
    num_kept = keep_T.sum()
    value = logits_TE.new_zeros(())
    for share, sign in ((rate, 1.0), (1 - rate, -1.0)):
        terms_TE = F.logsigmoid(sign * logits_TE).masked_fill(~keep_T[:, None], float("-inf"))
        log_mean_E = terms_TE.logsumexp(0) - num_kept.clamp_min(1).to(logits_TE.dtype).log()
        value = value + (share * (math.log(share) - log_mean_E)).sum()
    return torch.where(num_kept > 0, value, 0.0)
