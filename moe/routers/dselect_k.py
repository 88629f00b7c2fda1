"""DSelect-k (Hazimeh et al. 2021, arXiv 2106.03760): a sparse gate that is continuously differentiable.

One of E experts is named by a binary code of m = ceil(log2 E) bits, most significant first. A selector holds m real
numbers zeta; each passes the smooth step S, and expert i with bits b_ij has the weight

    q_i = prod_j (S(zeta_j) if b_ij else 1 - S(zeta_j)),    S(t) = 3 t / (2 gamma) - 2 t^3 / gamma^3 + 1/2,

S being exactly 0 below -gamma/2 and exactly 1 above gamma/2. K selectors are mixed by a softmax: a = sum_s w_s q^(s). Once
every bit is saturated a selector has one expert, and a token at most K. Until then a token may use every expert; those of
weight zero are not listed and cost nothing. That loses no gradient: S is flat where it is 0 or 1. For the same reason a
saturated bit is frozen for its token, until other tokens move the parameters.

Two regularisers in training, both means over tokens (sums in the released code, whose strength hence grows with the batch):
the entropy of each selector, which drives bits to saturation; and, where E is no power of two, 1 / (sum of q over the codes
that have an expert), since the others waste a selector. a is then not renormalised. A token whose selectors have all
saturated on codes without expert has no expert: its residual carries it, no gradient brings it back, and each of its
selectors counts 20 in the mean that is reported as loss "unreachable", where 1 is the least. A power of two has no such codes.

Legend: T tokens, D model, E experts, K selectors, m bits, C = 2^m codes, R rows: T, or 1 for the static gate.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_matrix
from moe.routers.base import RouterConfig, check_top_k
from moe.routers.losses import masked_mean
from moe.routers.schedule import ScheduledRouter, anneal
from moe.types import NO_INFO, AuxLoss, Routing, TokenInfo

LEAST_REACHABLE = 0.1  # below, the tangent of 1 / r goes on: infinity is no loss, and 1 / r^2 no gradient to train with
INIT_WIDTH = 256  # the widest input for which the paper's initial range is kept


@dataclass(frozen=True, kw_only=True)
class DSelectKConfig(RouterConfig):
    """Options of `DSelectKRouter`.

    Attributes:
        top_k: K selectors, the most experts that a token has in the end.
        gate: "per_example" computes codes and mixture from the token; "static" learns them as such, the same for all tokens.
        gamma: width of the smooth step.
        entropy_coef: factor on the entropy of the selectors (sum over selectors, mean over tokens). The paper tunes it and
            its code has none by default, but without it per-example gates stay far from K experts per token.
        entropy_warmup_steps: the factor grows linearly from 0 over so many optimizer steps; 0 starts with all of it. With
            all of it at once every token saturates on the same codes before the experts differ.
    """

    top_k: int = 2
    gate: Literal["per_example", "static"] = "per_example"
    gamma: float = 1.0
    entropy_coef: float = 0.01
    entropy_warmup_steps: int = 1000

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.gate not in ("per_example", "static"):
            raise ValueError(f"router.gate={self.gate!r} is unknown; use 'per_example' or 'static'")
        if not self.gamma > 0:
            raise ValueError(f"router.gamma={self.gamma} must be positive")
        for name in ("entropy_coef", "entropy_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name}={getattr(self, name)} must not be negative")


class DSelectKRouter(ScheduledRouter):
    """K selectors over binary codes; per token, or static.

    The Switch loss applies to the per-example gate; the static one, whose point is to use the same few experts for every
    token, passes it no gradient.
    """

    Config = DSelectKConfig
    config: DSelectKConfig

    def __init__(self, dim: int, num_experts: int, config: DSelectKConfig) -> None:
        super().__init__(dim, num_experts, config)
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts} leaves router dselect_k nothing to choose; use at least 2")
        check_top_k(config.top_k, num_experts)
        self.num_bits = (num_experts - 1).bit_length()
        num_codes = config.top_k * self.num_bits
        self.weight, self.mix_weight = None, None
        if config.gate == "per_example":
            self.weight = nn.Parameter(torch.empty(num_codes, dim))
            self.mix_weight = nn.Parameter(torch.empty(config.top_k, dim))
        self.bias = nn.Parameter(torch.empty(num_codes))
        self.mix_bias = nn.Parameter(torch.empty(config.top_k))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """The released code's ranges, gamma / 100 for codes and 0.05 for the mixture, whatever ``std``.

        The spread of the codes grows with the norm of the token, which behind a decoder's norm is sqrt(D); beyond D = 256
        the range of the weights shrinks so that it does not, or wide models would start with saturated, frozen bits. The
        token itself is not normalised here.
        """
        super().reset_parameters(std)
        shrink = min(1.0, (INIT_WIDTH / self.dim) ** 0.5)
        for codes, mix, factor in ((self.weight, self.mix_weight, shrink), (self.bias, self.mix_bias, 1.0)):
            if codes is not None and mix is not None:
                bound = self.config.gamma / 100 * factor
                nn.init.uniform_(codes, -bound, bound)
                nn.init.uniform_(mix, -0.05 * factor, 0.05 * factor)

    @property
    def mean_experts_per_token(self) -> float:
        """K, the most once all bits are saturated; up to E at the start."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to the experts with a weight that is not zero."""
        num_tokens, top_k = x_TD.shape[0], self.config.top_k
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.weight is None or self.mix_weight is None:
                codes_RC, mix_RK = self.bias.float()[None], self.mix_bias.float()[None]
            else:
                codes_RC = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
                mix_RK = F.linear(x_TD.float(), self.mix_weight.float(), self.mix_bias.float())
            chances_RKC = code_chances(codes_RC.view(-1, top_k, self.num_bits), self.config.gamma)
            selectors_RKE = chances_RKC[..., : self.num_experts]
            weights_RE = (mix_RK.softmax(-1)[..., None] * selectors_RKE).sum(1)
            probs_RE = weights_RE + (1 - weights_RE.sum(-1, keepdim=True)).clamp_min(0) / self.num_experts
            if self.weight is None:
                probs_RE = probs_RE.detach()
            return routing_of_matrix(
                weights_RE.expand(num_tokens, -1),
                probs_TE=probs_RE.expand(num_tokens, -1),
                aux_losses=self._losses(selectors_RKE, num_tokens, info.keep_T) if self.training else {},
            )

    def _losses(self, selectors_RKE: Tensor, num_tokens: int, keep_T: Tensor | None) -> dict[str, AuxLoss]:
        found = {}
        if self.config.entropy_coef:
            steps = self.get_buffer("steps")
            coef = anneal(0.0, self.config.entropy_coef, self.config.entropy_warmup_steps, steps, "linear")
            entropy_R = selector_entropy(selectors_RKE).sum(-1)
            found["entropy"] = AuxLoss(value=masked_mean(entropy_R.expand(num_tokens), keep_T), coef=coef)
        if self.num_experts < 2**self.num_bits:
            penalty_R = unreachable_penalty(selectors_RKE.sum(-1)).sum(-1)
            found["unreachable"] = AuxLoss(value=masked_mean(penalty_R.expand(num_tokens), keep_T), coef=1.0)
        return found


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """S of the module's formula; in this form rounding never takes it out of [0, 1]."""
    rise = (t / gamma + 0.5).clamp(0, 1)
    return rise * rise * (3 - 2 * rise)


def code_chances(codes_RKm: Tensor, gamma: float) -> Tensor:
    """(R, K, C) weight of every code of m bits, most significant first; sums to one over C.

    Doubles the table bit by bit, so that no tensor is larger than the result.
    """
    on_RKm, off_RKm = smooth_step(codes_RKm, gamma), smooth_step(-codes_RKm, gamma)
    bits_RKm2 = torch.stack([off_RKm, on_RKm], -1)
    chances_RKC = bits_RKm2[..., 0, :]
    for bit in range(1, codes_RKm.shape[-1]):
        chances_RKC = (chances_RKC[..., None] * bits_RKm2[..., bit, None, :]).flatten(-2)
    return chances_RKC


def selector_entropy(selectors_RKE: Tensor) -> Tensor:
    """(R, K) -sum_i q_i ln(q_i + 1e-6) over the experts, as in the released code."""
    return -(selectors_RKE * (selectors_RKE + 1e-6).log()).sum(-1)


def unreachable_penalty(reachable: Tensor) -> Tensor:
    """1 / reachable, continued by its tangent below `LEAST_REACHABLE`; any shape, values in [0, 1]."""
    safe = reachable.clamp_min(LEAST_REACHABLE)
    return 1 / safe + (safe - reachable) / LEAST_REACHABLE**2
