"""SparseMixer-v2 (GRIN MoE, Liu et al. 2024, arXiv 2409.12136 appendix A): sampled top-k with a third-order gradient.

As in `sparsemixer`, an expert is drawn from a softmax over the experts near the best one. The difference f(h) - f(0) in
its router gradient is replaced by Heun's rule h (f'(h) / 4 + 3 f'(h / 3) / 4), exact where f is cubic (algorithm 1):

    D ~ p,  B ~ Bernoulli(1/4),  y = a p_D E_D(x)  with a = 1 if D is the best expert or B = 1, else 1/3

The forward pass has the factor a and the backward pass does not, so that the router's gradient is that of p_D with the
upstream gradient taken at a p_D E_D(x). For K > 1 this is repeated without replacement (algorithm 3): each pass has its own
mask and softmax over what is left, so the weights do not sum to one.

The released model was trained on objective (7), in which the weight inside the loss is held constant:
sum_i p_i f(sg(p_i) E_i). ``corrected`` is the paper's v2*, the gradient of objective (4), sum_i p_i f(p_i E_i): the
softmax has temperature 2, B ~ Bernoulli(5/8), and the gradient is doubled (algorithm 2). The paper saw no difference in
quality between the two.

Differences between paper and code, and what is done here: eq. 2 masks by z* - z_i <= r (|z_i| + |z*|), the code by
(z* - z_i) / max(|z_i|, z*) <= 2 r, which keeps whatever eq. 2 keeps; as in the code. The code's factor is .3333; here 1/3.
There is no learned output scale.

Legend: T tokens, E experts, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices
from moe.routers.base import Router, RouterConfig, check_top_k
from moe.routers.sparsemixer import Rule, check_jitter_eps, choose, near_best
from moe.types import NO_INFO, Routing, TokenInfo

HEUN = Rule(low=1 / 3, full_chance=1 / 4, gain=1.0)
HEUN_CORRECTED = Rule(low=1 / 3, full_chance=5 / 8, gain=2.0)


@dataclass(frozen=True, kw_only=True)
class SparseMixerV2Config(RouterConfig):
    """Options of `SparseMixerV2Router`.

    Attributes:
        top_k: K, experts per token; the authors use 1 and 2.
        jitter_eps: how far below the best an expert's logit may lie to be drawn, relative to their size (0.1 in the
            authors' module, 0.01 in the released PhiMoE configuration).
        corrected: estimate the gradient of the objective that is trained, with temperature 2 (v2* in the paper).
    """

    top_k: int = 2
    jitter_eps: float = 0.1
    corrected: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        check_jitter_eps(self.jitter_eps)


class SparseMixerV2Router(Router):
    """K experts per token: drawn in training, the best in evaluation, weighted by their masked probabilities.

    The unmasked softmax feeds the balance loss, with the drawn experts as load.
    """

    Config = SparseMixerV2Config
    config: SparseMixerV2Config

    def __init__(self, dim: int, num_experts: int, config: SparseMixerV2Config) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``."""
        nn.init.normal_(self.weight, std=std)

    @property
    def mean_experts_per_token(self) -> float:
        """K."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to exactly K experts."""
        rule, temperature = (HEUN_CORRECTED, 2.0) if self.config.corrected else (HEUN, 1.0)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            allowed_TE = torch.ones_like(logits_TE, dtype=torch.bool)
            choices = []
            for _ in range(self.config.top_k):
                kept_TE = near_best(logits_TE, self.config.jitter_eps, allowed_TE)
                choices.append(choose(logits_TE / temperature, kept_TE, rule, self.training))
                allowed_TE = allowed_TE.scatter(1, choices[-1].ids_T[:, None], False)
            probs_TE = logits_TE.softmax(-1)
        return routing_of_choices(
            torch.stack([choice.ids_T for choice in choices], 1),
            torch.stack([choice.weights_T for choice in choices], 1),
            self.num_experts,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )
