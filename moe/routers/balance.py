"""Balance settings of a layer, and the auxiliary-loss-free bias update."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SCOPES = ("micro_batch", "sequence", "global_batch")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which losses keep the experts balanced.

    Attributes:
        aux_coef: factor on the Switch loss; 0 turns it off. Routers that balance by other means ignore it
            (``Router.takes_balance_loss``).
        aux_scope: the tokens over which its load fractions are taken: one rank's micro-batch, each sequence, or everything
            seen since the last optimizer step on all data-parallel ranks (arXiv 2501.11873: the least constraint on
            specialisation for the same balance).
        z_coef: factor on the router z-loss; 0 turns it off (ST-MoE: 1e-3).
        bias_update_rate: step u of the selection bias, once per optimizer step (DeepSeek-V3: 1e-3); needs a router with
            ``selection_bias``.
    """

    aux_coef: float = 0.01
    aux_scope: Literal["micro_batch", "sequence", "global_batch"] = "global_batch"
    z_coef: float = 0.0
    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.aux_scope not in SCOPES:
            raise ValueError(f"balance.aux_scope={self.aux_scope!r} is unknown; use one of {SCOPES}")
        for name in ("aux_coef", "z_coef", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name}={getattr(self, name)} must not be negative")


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean(c) - c_i), in place (arXiv 2408.15664 algorithm 1); counts over all ranks and micro-batches."""
    counts_E = counts_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(counts_E.mean() - counts_E), alpha=rate)
