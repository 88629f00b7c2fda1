"""Mixture of Tokens (Antoniak et al., arXiv 2310.15961): each expert processes one weighted mean of a group's tokens.

The group are the tokens at the same position of ``group_size`` sequences. With the controller's logits z = x W and a temperature
tau, the weight of a token in an expert's mixture is softmax(z / tau) over the group's tokens, and the expert's output goes back
to each token with the same weight. Nothing crosses positions, so causal models may use it; a result depends on the sequences
that it is batched with, and a prompt alone (a group of one) is nothing the model was trained on. The paper's transition tuning
ends that: from ``sparse_after`` optimizer steps on, the same weights route each token to its best experts.

The paper matches the FLOPs of a dense layer by experts whose widths sum to group_size times the dense width.

Legend: T tokens, D model, E experts (each with one slot), K top-k, G groups, M rows of a group.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices
from moe.routers.base import RouterConfig
from moe.routers.groups import TokenGroups, check_group, group_tokens, softmax_over_rows, warn_of_extra_work
from moe.routers.schedule import ScheduledRouter
from moe.types import NO_INFO, Routing, SoftRouting, TokenInfo


@dataclass(frozen=True, kw_only=True)
class MixtureOfTokensConfig(RouterConfig):
    """Options of `MixtureOfTokensRouter`.

    Attributes:
        group_size: sequences whose tokens are mixed; the last group has what is left of the batch.
        temperature: tau, its first value if it is learned.
        learn_temperature: learn one temperature for all experts, in logarithms so that it stays positive.
        emit: weight of an expert's output in a token's result: "merge" is the token's weight in the mixture, as in the
            paper; "experts" a softmax over the experts of the same logits.
        sparse_after: optimizer steps after which every token goes to its ``sparse_top_k`` experts, as in `TopKRouter`; 0 from
            the start (for a trained model that shall not depend on the batch), ``None`` never.
        sparse_top_k: K; its weights are softmax probabilities, renormalised if K > 1.
    """

    group_size: int = 32
    temperature: float = 1.0
    learn_temperature: bool = False
    emit: Literal["merge", "experts"] = "merge"
    sparse_after: int | None = None
    sparse_top_k: int = 1

    def __post_init__(self) -> None:
        check_group("position", self.group_size)
        if self.temperature <= 0:
            raise ValueError(f"router.temperature={self.temperature} must be positive")
        if self.emit not in ("merge", "experts"):
            raise ValueError(f"router.emit={self.emit!r} is unknown; use 'merge' or 'experts'")
        if self.sparse_after is not None and self.sparse_after < 0:
            raise ValueError(f"router.sparse_after={self.sparse_after} must be a number of steps, or null for never")
        if self.sparse_top_k < 1:
            raise ValueError(f"router.sparse_top_k={self.sparse_top_k} must be at least 1")


class MixtureOfTokensRouter(ScheduledRouter):
    """Mixtures of the tokens at one position, and token choice after the transition.

    Without a learned temperature the only parameter is the gate; it loads into `TopKRouter`. A learned temperature gets no
    gradient after the transition, where no temperature is used.

    Attributes:
        weight: (E, D).
        log_temperature: (1,) log(tau / ``temperature``); only if learned.
    """

    Config = MixtureOfTokensConfig
    config: MixtureOfTokensConfig

    def __init__(self, dim: int, num_experts: int, config: MixtureOfTokensConfig) -> None:
        super().__init__(dim, num_experts, config)
        if config.sparse_top_k > num_experts:
            raise ValueError(
                f"router.sparse_top_k={config.sparse_top_k} is more than num_experts={num_experts}; lower it or add experts"
            )
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(1))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``; the temperature at its first value, no steps done."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.get_buffer("steps"))
        if self.config.learn_temperature:
            nn.init.zeros_(self.log_temperature)

    @property
    def is_sparse(self) -> bool:
        """Whether the transition is behind; waits for the device where one is planned."""
        after, steps = self.config.sparse_after, self.get_buffer("steps")
        if after is None or steps.is_meta:
            return after == 0
        return after == 0 or int(steps) >= after

    @property
    def mean_experts_per_token(self) -> float:
        """Mixtures per token of a full group; K after the transition."""
        return self.config.sparse_top_k if self.is_sparse else self.num_experts / self.config.group_size

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing | SoftRouting:
        """Mixture weights; the top-k of every token after the transition."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            if self.is_sparse:
                return self._choose(logits_TE)
            groups = group_tokens(x_TD.shape[0], info, "position", self.config.group_size, x_TD.device)
            if self.training:
                done, asked = self.num_experts / groups.num_rows, self.num_experts / self.config.group_size
                fix = f"use a larger micro-batch, or set router.group_size={groups.num_rows}"
                warn_of_extra_work("mixture_of_tokens", done, asked, groups.num_rows, fix)
            return self._mix(logits_TE, groups)

    def _mix(self, logits_TE: Tensor, groups: TokenGroups) -> SoftRouting:
        temperature: Tensor | float = self.config.temperature
        if self.config.learn_temperature:
            temperature = temperature * self.log_temperature.float().exp()
        logits_GME = groups.gather(logits_TE / temperature)
        merge_GME = emit_GME = softmax_over_rows(logits_GME, groups.real_GM)
        if self.config.emit == "experts":
            emit_GME = logits_GME.softmax(-1)
            if groups.real_GM is not None:
                emit_GME = emit_GME.masked_fill(~groups.real_GM[..., None], 0.0)
        return SoftRouting(
            num_experts=self.num_experts,
            dispatch_GMS=merge_GME,
            combine_GMS=emit_GME,
            token_ids_GM=groups.token_ids_GM,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(-1),
        )

    def _choose(self, logits_TE: Tensor) -> Routing:
        probs_TE, top_k = logits_TE.softmax(-1), self.config.sparse_top_k
        expert_ids_TK = logits_TE.detach().topk(top_k, dim=-1).indices
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return routing_of_choices(expert_ids_TK, weights_TK, self.num_experts, logits_TE=logits_TE, probs_TE=probs_TE)
