"""Soft MoE (Puigcerver et al., arXiv 2308.00951): experts process slots, weighted means of a group's tokens.

    logits L = scale * norm(X) norm(Phi),  dispatch D = softmax of L over tokens,  combine C = softmax of L over slots
    Y = C experts(D^T X)

Nothing is chosen, so nothing is dropped, balanced or without gradient. Every token sees every token of its group, which is the
sequence in the paper (one image): not for causal models, unless groups are the tokens at one position of several sequences.
The released JAX code (vmoe) has the norms always, its reinforcement-learning port (dopamine) leaves them off by default.

Legend: T tokens, D model, E experts, S slots (a number p for each expert), G groups, M rows of a group.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.base import Router, RouterConfig, WidthRole
from moe.routers.groups import check_group, describe_leak, group_tokens, softmax_over_rows, warn_of_extra_work
from moe.types import NO_INFO, SoftRouting, TokenInfo


@dataclass(frozen=True, kw_only=True)
class SoftConfig(RouterConfig):
    """Options of `SoftRouter`.

    Attributes:
        group: "sequence" as in the paper, or "position" (see `moe.routers.groups`).
        group_size: tokens of a group: the sequences in a position group; for "sequence" the usual length of a sequence, by which
            slots are counted (any length works, with the same slots).
        capacity_factor: slots per token; an expert has p = group_size * capacity_factor / E of them, rounded, at least 1.
        slots_per_expert: p itself, instead; 1 in the paper's main runs.
        normalize: scale tokens and slot vectors to unit length, with a learned factor on the logits.
    """

    group: Literal["sequence", "position"] = "sequence"
    group_size: int = 256
    capacity_factor: float = 1.0
    slots_per_expert: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        check_group(self.group, self.group_size, ("sequence", "position"))
        if self.capacity_factor <= 0:
            raise ValueError(f"router.capacity_factor={self.capacity_factor} must be positive")
        if self.slots_per_expert is not None and self.slots_per_expert < 1:
            raise ValueError(
                f"router.slots_per_expert={self.slots_per_expert} must be at least 1, or null to follow "
                "router.capacity_factor"
            )


class SoftRouter(Router):
    """Dispatch and combine weights from the similarity of tokens and slots.

    Attributes:
        weight: (S, D), the paper's Phi transposed; slots of one expert are next to each other.
        scale: (1,) learned factor on the logits, from 1; only with ``normalize``.
    """

    Config = SoftConfig
    config: SoftConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: SoftConfig) -> None:
        super().__init__(dim, num_experts, config)
        per_expert = max(1, math.floor(config.group_size * config.capacity_factor / num_experts + 0.5))
        self.slots_per_expert = config.slots_per_expert or per_expert
        self.weight = nn.Parameter(torch.empty(num_experts * self.slots_per_expert, dim))
        if config.normalize:
            self.scale = nn.Parameter(torch.ones(1))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """LeCun normal, whatever the model's range: its size matters only without ``normalize``. The scale starts at 1."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.config.normalize:
            nn.init.ones_(self.scale)

    def width_roles(self) -> dict[str, WidthRole]:
        """With ``normalize`` only the direction of a slot's vector counts."""
        role = WidthRole(role="normalized" if self.config.normalize else "output", init_exponent=0.5)
        return super().width_roles() | {"weight": role}

    @property
    def mean_experts_per_token(self) -> float:
        """Slots per token of a full group."""
        return self.num_experts * self.slots_per_expert / self.config.group_size

    def causal_problem(self) -> str | None:
        """Groups of one sequence see the future."""
        return None if self.config.group == "position" else describe_leak("soft", self.config.group)

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> SoftRouting:
        """Weights of every token in every slot of its group; padding has none, in either direction."""
        num_tokens, num_slots = x_TD.shape[0], self.weight.shape[0]
        groups = group_tokens(num_tokens, info, self.config.group, self.config.group_size, x_TD.device)
        if self.training and num_tokens:
            fix = f"set router.group_size={groups.num_rows}"
            fix += ", or use a larger micro-batch" if self.config.group == "position" else ""
            asked = self.mean_experts_per_token
            warn_of_extra_work("soft", num_slots / groups.num_rows, asked, groups.num_rows, fix)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TS = self._logits(x_TD.float())
            logits_GMS = groups.gather(logits_TS)
            combine_GMS = logits_GMS.softmax(-1)
            if groups.real_GM is not None:
                combine_GMS = combine_GMS.masked_fill(~groups.real_GM[..., None], 0.0)
            # Sums of exponentials over an expert's slots: their softmax is the sum of its combine weights.
            logits_TE = logits_TS.view(num_tokens, self.num_experts, self.slots_per_expert).logsumexp(-1)
            return SoftRouting(
                num_experts=self.num_experts,
                dispatch_GMS=softmax_over_rows(logits_GMS, groups.real_GM),
                combine_GMS=combine_GMS,
                token_ids_GM=groups.token_ids_GM,
                logits_TE=logits_TE,
                probs_TE=logits_TE.softmax(-1),
            )

    def _logits(self, x_TD: Tensor) -> Tensor:
        if not self.config.normalize:
            return F.linear(x_TD, self.weight.float())
        return self.scale.float() * F.linear(_unit_rows(x_TD), _unit_rows(self.weight.float()))


def _unit_rows(v_RD: Tensor) -> Tensor:
    """Rows of length 1; the constant of the released code keeps a row of zeros at zero."""
    return v_RD * (v_RD.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
