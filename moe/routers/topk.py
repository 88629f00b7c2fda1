"""Top-k token choice: softmax or sigmoid scores, optional groups, selection bias, renormalisation and jitter.

One configurable gate covers the family: Mixtral and Qwen (arXiv 2401.04088), Switch (arXiv 2101.03961), OLMoE
(softmax over all, not renormalised), Llama-4 style sigmoid, and DeepSeek-V3's group-limited sigmoid with an auxiliary-loss-free
selection bias (arXiv 2412.19437 eq. 12-16, arXiv 2408.15664). Scores are computed in fp32 whatever the input's dtype
("selective precision", arXiv 2101.03961 table 2).

There are two roads to the same result: plain torch, in steps that subclasses may replace, and the fused kernels of
`ops.route_topk` where those run, which keep no T x E matrix but the logits.

Legend: T tokens, D model, E experts, K top-k, G groups, N = T * K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels import ops
from moe.routers.assemble import routing_of_choices
from moe.routers.base import Router, RouterConfig, check_top_k
from moe.types import NO_INFO, AuxLoss, Routing, TokenInfo, TopKRule


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TopKRule, RouterConfig):
    """Options of `TopKRouter`: those of `TopKRule`, and these.

    Attributes:
        jitter: in training, multiply the router's input by U(1 - jitter, 1 + jitter) (arXiv 2101.03961; 1e-2 there).
        selection_bias: keep a bias per expert that changes who is chosen and never the weight (`balance.update_bias`).
        frozen: do not train the gate; the only way to have top-1 with weight 1, as some converted models do.
    """

    jitter: float = 0.0
    selection_bias: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"router.score={self.score!r} is unknown; use 'softmax' or 'sigmoid'")
        if self.softmax_order not in ("before", "after"):
            raise ValueError(f"router.softmax_order={self.softmax_order!r} is unknown; use 'before' or 'after'")
        renormalized = self.renormalize or (self.score == "softmax" and self.softmax_order == "after")
        if self.top_k == 1 and renormalized and not self.frozen:
            raise ValueError(
                "router.top_k=1 with renormalised weights makes every weight 1 and gives the router no gradient; "
                "set router.renormalize=false and router.softmax_order=before, use router.name=switch, or router.frozen=true"
            )
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise ValueError(
                f"router.top_k_groups={self.top_k_groups} must lie between 1 and router.num_groups={self.num_groups}"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router.jitter={self.jitter} must lie in [0, 1)")


# Of plain torch, which subclasses may replace.
_STEPS = ("perturb", "select", "weigh")


class TopKRouter(Router):
    """Linear gate without bias, then the top-k of its scores."""

    Config = TopKConfig
    config: TopKConfig
    fp32_buffers = ("bias_E",)  # its steps of 1e-3 would vanish in bf16

    def __init__(self, dim: int, num_experts: int, config: TopKConfig) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)
        if num_experts % config.num_groups:
            raise ValueError(f"num_experts={num_experts} is not divisible by router.num_groups={config.num_groups}")
        reachable = num_experts // config.num_groups * config.top_k_groups
        if config.top_k > reachable:
            raise ValueError(
                f"router.top_k={config.top_k} is more than the {reachable} experts in router.top_k_groups="
                f"{config.top_k_groups} of {config.num_groups} groups"
            )
        self.weight = nn.Parameter(torch.empty(num_experts, dim), requires_grad=not config.frozen)
        if config.selection_bias:
            self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``; the selection bias starts at zero."""
        nn.init.normal_(self.weight, std=std)
        if self.config.selection_bias:
            nn.init.zeros_(self.get_buffer("bias_E"))

    @property
    def mean_experts_per_token(self) -> float:
        """K."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to exactly K experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.config.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            logits_TE = self.logits(x_TD)
            if self._runs_fused(logits_TE, info):
                return self._route_fused(logits_TE, info)
            noisy_TE, aux_losses = self.perturb(x_TD, logits_TE, info.keep_T)
            scores_TE = noisy_TE.sigmoid() if self.config.score == "sigmoid" else noisy_TE.softmax(-1)
            expert_ids_TK = self.select(scores_TE.detach() if self.config.score == "sigmoid" else noisy_TE.detach())
            weights_TK = self.weigh(noisy_TE, scores_TE, expert_ids_TK)
            probs_TE = scores_TE
            if self.config.score == "sigmoid":
                probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
            elif noisy_TE is not logits_TE:
                probs_TE = logits_TE.softmax(-1)
        return routing_of_choices(
            expert_ids_TK, weights_TK, self.num_experts, logits_TE=logits_TE, probs_TE=probs_TE, aux_losses=aux_losses
        )

    def _runs_fused(self, logits_TE: Tensor, info: TokenInfo) -> bool:
        """Whether the fused kernels do what this router does: they know no step of a subclass, and give no probabilities."""
        own_steps = any(getattr(type(self), step) is not getattr(TopKRouter, step) for step in _STEPS)
        return not (own_steps or info.wants_probs) and ops.chosen(logits_TE.device.type, logits_TE.dtype) == "triton"

    def _route_fused(self, logits_TE: Tensor, info: TokenInfo) -> Routing:
        bias_E = self.get_buffer("bias_E") if self.config.selection_bias else None
        choices = ops.route_topk(logits_TE, self.config, bias_E, info.keep_T)
        return routing_of_choices(
            choices.expert_ids_TK,
            choices.weights_TK,
            self.num_experts,
            counts_E=choices.counts_E,
            logits_TE=logits_TE,
            stats=choices.stats,
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) fp32 from fp32 input; gates that transform their input or output override this."""
        return F.linear(x_TD, self.weight.float())

    def perturb(self, x_TD: Tensor, logits_TE: Tensor, keep_T: Tensor | None) -> tuple[Tensor, dict[str, AuxLoss]]:
        """Logits used for the decision, and losses of the perturbation; noisy routers override this."""
        return logits_TE, {}

    def select(self, scores_TE: Tensor) -> Tensor:
        """(T, K) int64 ids of the chosen experts, best first; no gradient passes."""
        if self.config.selection_bias:
            if self.config.score == "softmax":
                scores_TE = scores_TE.softmax(-1)
            scores_TE = scores_TE + self.get_buffer("bias_E")
        if self.config.num_groups > 1:
            scores_TE = self._mask_groups(scores_TE)
        return scores_TE.topk(self.config.top_k, dim=-1).indices

    def _mask_groups(self, scores_TE: Tensor) -> Tensor:
        """Keep the ``top_k_groups`` best groups of each token.

        A group's score is the sum of its two best experts where there is a selection bias (DeepSeek-V3), else its best
        expert (DeepSeek-V2). Masked with -inf: a fill of 0 would win over experts whose biased score is negative.
        """
        num_tokens, num_groups = scores_TE.shape[0], self.config.num_groups
        grouped_TGe = scores_TE.view(num_tokens, num_groups, self.num_experts // num_groups)
        num_best = min(2 if self.config.selection_bias else 1, grouped_TGe.shape[-1])
        group_scores_TG = grouped_TGe.topk(num_best, dim=-1).values.sum(-1)
        kept_TG = group_scores_TG.topk(self.config.top_k_groups, dim=-1).indices
        dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept_TG, False)
        return grouped_TGe.masked_fill(dropped_TG[..., None], float("-inf")).view_as(scores_TE)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """(T, K) fp32 combine weights of the chosen experts, from unbiased scores."""
        if self.config.score == "softmax" and self.config.softmax_order == "after":
            weights_TK = logits_TE.gather(1, expert_ids_TK).softmax(-1)
        else:
            weights_TK = scores_TE.gather(1, expert_ids_TK)
            if self.config.renormalize:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return weights_TK * self.config.route_scale
