"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538 eq. 3-5) with its importance and load losses (eq. 6-10).

    H(x)_i = (x W_g)_i + N(0, 1) * softplus((x W_noise)_i),  G(x) = softmax(top-k(H(x)))

Noise is drawn in training only. Both matrices start at zero, so that the noise alone spreads the load at first (appendix A).

Legend: T tokens, E experts, K top-k.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.losses import masked_mean, squared_variation
from moe.routers.topk import TopKConfig, TopKRouter
from moe.types import AuxLoss


@dataclass(frozen=True, kw_only=True)
class NoisyTopKConfig(TopKConfig):
    """`TopKConfig` with the noise's options; the softmax is taken over the chosen logits, as in eq. 3.

    Attributes:
        importance_coef: factor on CV^2 of the summed gate values per expert (eq. 6-7; 0.1 in the paper's LM runs).
        load_coef: factor on CV^2 of the smooth load (eq. 8-10).
    """

    softmax_order: Literal["before", "after"] = "after"
    importance_coef: float = 0.1
    load_coef: float = 0.1


class NoisyTopKRouter(TopKRouter):
    """Top-k of noisy logits; the noise's scale is learned per token and expert."""

    Config = NoisyTopKConfig
    config: NoisyTopKConfig

    def __init__(self, dim: int, num_experts: int, config: NoisyTopKConfig) -> None:
        super().__init__(dim, num_experts, config)
        if config.top_k >= num_experts:
            raise ValueError(
                f"router.top_k={config.top_k} must be below num_experts={num_experts}: with every expert chosen "
                "the load loss is undefined"
            )
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def reset_parameters(self, std: float) -> None:
        """Zeros, as in appendix A of the paper."""
        nn.init.zeros_(self.weight)
        if hasattr(self, "noise_weight"):  # the base class initialises before the noise exists
            nn.init.zeros_(self.noise_weight)

    def perturb(self, x_TD: Tensor, logits_TE: Tensor, keep_T: Tensor | None) -> tuple[Tensor, dict[str, AuxLoss]]:
        """Noisy logits in training, with both losses; the clean ones otherwise."""
        if not self.training:
            return logits_TE, {}
        std_TE = F.softplus(F.linear(x_TD, self.noise_weight.float()))
        noisy_TE = logits_TE + torch.randn_like(logits_TE) * std_TE
        top_logits_TK, top_ids_TK = noisy_TE.topk(self.config.top_k, dim=-1)
        gates_TE = torch.zeros_like(noisy_TE).scatter(1, top_ids_TK, top_logits_TK.softmax(-1))
        load_TE = _load_probabilities(logits_TE, noisy_TE, std_TE, self.config.top_k)
        return noisy_TE, {
            "importance": AuxLoss(
                value=squared_variation(masked_mean(gates_TE, keep_T)), coef=self.config.importance_coef
            ),
            "load": AuxLoss(value=squared_variation(masked_mean(load_TE, keep_T)), coef=self.config.load_coef),
        }


def _load_probabilities(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """P(x, i) of eq. 9: the chance that expert i is among the top k if only its own noise were drawn again.

    The threshold is the k-th largest noisy logit of the *other* experts: the (k+1)-th largest overall for an expert
    that is in the top k, the k-th largest for one that is not.
    """
    top_TK1 = noisy_TE.topk(top_k + 1, dim=-1).values
    kth_T1, next_T1 = top_TK1[:, top_k - 1 : top_k], top_TK1[:, top_k:]
    threshold_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
    return torch.special.ndtr((logits_TE - threshold_TE) / std_TE)
