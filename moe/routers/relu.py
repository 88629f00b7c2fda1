"""ReLU routing (ReMoE, Wang, Chen and Zhu 2024, arXiv 2412.14711): R = ReLU(x W), expert e is active where R_e > 0.

The weights are R itself: no softmax, no top-k, continuous through zero. How many experts a token has varies; an L1
regulariser holds the mean at K by a coefficient that a controller adapts after every optimizer step,

    L = 1/T sum_t sum_e f_e R_te,    f_e = E / (K T) * (tokens that use e),    no gradient through f,
    lambda <- lambda * alpha where the share of active pairs is above K / E, else lambda / alpha.

The factor f makes it a balance loss as well: experts above their share are pushed harder. As in the released code the
layers' losses add up, and equality divides. Lambda starts tiny, so training begins dense (half of all pairs are active under
a symmetric initialisation) and needs the memory for it; about a hundred steps later it is sparse.

A fixed lambda would drive all gates to zero, and an expert that is inactive for every token gets no gradient at all and
stays so. A token without an active expert passes by its residual alone. The gate has no bias: on tokens that are symmetric
about zero every expert is active for half of them whatever its weights are, and lambda rises in vain. What a decoder's norm
puts out is not symmetric.

Legend: T tokens, D model, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix
from moe.routers.base import Router, RouterConfig, StepLoad, check_top_k
from moe.routers.losses import masked_mean
from moe.types import NO_INFO, AuxLoss, Routing, TokenInfo

# Bounds that the paper does not have. At fp32's zero lambda would stay for ever; a density that cannot rise to its target
# (K / E above a half, early) gets there in some 450 steps. Infinity would be NaN times a loss of zero.
LEAST_COEF, MOST_COEF = 1e-12, 1e6


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(RouterConfig):
    """Options of `ReLURouter`, with the paper's values.

    Attributes:
        top_k: K, active experts per token that the controller aims at, on average over tokens and layers.
        l1_coef: lambda at step 0.
        l1_step: alpha, by which lambda goes up or down after every optimizer step.
    """

    top_k: int = 2
    l1_coef: float = 1e-8
    l1_step: float = 1.2

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if not LEAST_COEF <= self.l1_coef <= MOST_COEF:
            raise ValueError(f"router.l1_coef={self.l1_coef} must lie in [{LEAST_COEF}, {MOST_COEF}]")
        if not self.l1_step > 1:
            raise ValueError(f"router.l1_step={self.l1_step} must be above 1")


class ReLURouter(Router):
    """ReLU gate with adaptive L1 regularisation.

    Attributes:
        l1_coef: () fp32 buffer, lambda. All layers of a model that finish their steps together have the same.
    """

    Config = ReLUConfig
    config: ReLUConfig
    fp32_buffers = ("l1_coef",)
    takes_balance_loss = False
    uses_load = True

    def __init__(self, dim: int, num_experts: int, config: ReLUConfig) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("l1_coef", torch.zeros((), dtype=torch.float32))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``; lambda as configured."""
        nn.init.normal_(self.weight, std=std)
        nn.init.constant_(self.get_buffer("l1_coef"), self.config.l1_coef)

    @property
    def mean_experts_per_token(self) -> float:
        """K, where the controller leads; E / 2 at the start."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to the experts with a positive logit."""
        aux_losses = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            weights_TE = logits_TE.relu()
            if self.training:
                value = l1_loss(weights_TE, self.config.top_k, info.keep_T)
                # A copy: the controller moves the buffer in place.
                aux_losses["l1"] = AuxLoss(value=value, coef=self.get_buffer("l1_coef").clone())
            return routing_of_matrix(
                weights_TE, logits_TE=logits_TE, probs_TE=_shares(weights_TE), aux_losses=aux_losses
            )

    @torch.no_grad()
    def after_step(self, load: StepLoad) -> None:
        """Raise lambda where more pairs are active than K / E, lower it otherwise."""
        assert load.model_density is not None
        coef = self.get_buffer("l1_coef")
        target = torch.full_like(load.model_density, self.config.top_k / self.num_experts)
        up, down = coef * self.config.l1_step, coef / self.config.l1_step
        coef.copy_(torch.where(load.model_density > target, up, down).clamp(LEAST_COEF, MOST_COEF))


def l1_loss(weights_TE: Tensor, top_k: int, keep_T: Tensor | None = None) -> Tensor:
    """() fp32 loss of the module's formula, over the tokens of ``keep_T``; with even loads of K / E, a token's mean sum of weights.

    Args:
        weights_TE: (T, E) R, with gradient.
        top_k: K.
        keep_T: (T,) bool, or ``None`` for all.
    """
    active_E = masked_mean((weights_TE.detach() > 0).to(weights_TE.dtype), keep_T)
    load_E = active_E * (weights_TE.shape[1] / top_k)
    return (load_E * masked_mean(weights_TE, keep_T)).sum()


def _shares(weights_TE: Tensor) -> Tensor:
    """(T, E) rows that sum to one: R divided by its sum; uniform where no expert is active."""
    sums_T1 = weights_TE.sum(-1, keepdim=True)
    shares_TE = weights_TE / sums_T1.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(sums_T1 > 0, shares_TE, 1 / weights_TE.shape[1])
