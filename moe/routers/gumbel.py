"""Gumbel-softmax routing (Jang et al., arXiv 1611.01144), as in Gumbel-gated mixtures of experts (GG MoE, arXiv 2502.03608).

In training every token draws y = softmax((z + g) / tau), with z its logits and g independent Gumbel(0, 1) noise. The largest
entry of y is a draw from softmax(z) whatever tau is; tau only says how close y is to that one-hot draw. Three ways to use y:

- ``soft`` (GG MoE): y are the weights, so every expert runs on every token.
- ``hard``: only the drawn expert i runs, with weight 1 forward and the gradient of y_i backward.
- ``hard_all``: the same forward, but the gradient of every entry of y, the straight-through estimator. It needs the
  output of every expert, so training costs as much as ``soft``.

Legend: T tokens, D model, E experts, S samples.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices, routing_of_matrix, straight_through
from moe.routers.schedule import ScheduledRouter, TemperatureConfig
from moe.types import NO_INFO, Routing, TokenInfo

MODES = ("soft", "hard", "hard_all")


@dataclass(frozen=True, kw_only=True)
class GumbelConfig(TemperatureConfig):
    """Options of `GumbelRouter`; a constant temperature of 1 by default, as in GG MoE.

    Attributes:
        mode: how the draw is used, see the module.
        eval_samples: in evaluation the weights of mode "soft" are the mean of y over this many draws (GG MoE: 10), 0 takes
            softmax(z / tau) instead; the other modes choose the largest logit. See `evaluation_noise`.
    """

    mode: Literal["soft", "hard", "hard_all"] = "soft"
    eval_samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"router.mode={self.mode!r} is unknown; use one of {MODES}")
        if self.eval_samples < 0:
            raise ValueError(f"router.eval_samples={self.eval_samples} must not be negative; 0 evaluates without noise")


class GumbelRouter(ScheduledRouter):
    """Linear gate with bias, as in GG MoE, and Gumbel noise in training.

    The Switch loss acts in mode "hard" only: where every expert is listed for every token its load fractions are constant.
    """

    Config = GumbelConfig
    config: GumbelConfig

    def __init__(self, dim: int, num_experts: int, config: GumbelConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``, no bias; GG MoE leaves both to PyTorch's default for linear layers."""
        super().reset_parameters(std)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    @property
    def mean_experts_per_token(self) -> float:
        """1 in mode "hard" and in evaluation of "hard_all", else E."""
        return 1 if self._is_sparse else self.num_experts

    @property
    def _is_sparse(self) -> bool:
        return self.config.mode == "hard" or (self.config.mode == "hard_all" and not self.training)

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Draw in training; decide without chance in evaluation."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
            y_TE = self._weights(logits_TE)
            probs_TE = logits_TE.softmax(-1)
            if self.config.mode == "soft":
                return routing_of_matrix(y_TE, logits_TE=logits_TE, probs_TE=probs_TE)
            chosen_T1 = y_TE.argmax(-1, keepdim=True)
            if self._is_sparse:
                weight_T1 = straight_through(torch.ones_like(y_TE[:, :1]), y_TE.gather(1, chosen_T1))
                return routing_of_choices(
                    chosen_T1, weight_T1, self.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
                )
            one_hot_TE = torch.zeros_like(y_TE).scatter(1, chosen_T1, 1.0)
            listed_TE = y_TE > 0  # an entry that underflowed has no gradient
            return routing_of_matrix(
                straight_through(one_hot_TE, y_TE), listed_TE, logits_TE=logits_TE, probs_TE=probs_TE
            )

    def _weights(self, logits_TE: Tensor) -> Tensor:
        temperature = self.config.temperature(self.get_buffer("steps"))
        if self.training:
            return gumbel_softmax(logits_TE, gumbel_noise(logits_TE), temperature)
        if self.config.mode == "soft" and self.config.eval_samples:
            noise_SE = evaluation_noise(self.config.eval_samples, self.num_experts).to(logits_TE)
            return mean_gumbel_softmax(logits_TE, noise_SE, temperature)
        return (logits_TE / temperature).softmax(-1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent Gumbel(0, 1) draws from the global generator, -log of an exponential; shape and dtype of ``like``."""
    exponential = torch.empty_like(like, memory_format=torch.contiguous_format).exponential_()
    return -exponential.clamp_min_(torch.finfo(like.dtype).tiny).log()


def gumbel_softmax(logits_TE: Tensor, noise_TE: Tensor, temperature: Tensor | float) -> Tensor:
    """(T, E) softmax((logits + noise) / temperature); the noise broadcasts."""
    return ((logits_TE + noise_TE) / temperature).softmax(-1)


def mean_gumbel_softmax(logits_TE: Tensor, noise_SE: Tensor, temperature: Tensor | float) -> Tensor:
    """(T, E) mean over samples of `gumbel_softmax`.

    A token's result is linear in its weights, so combining once with their mean is the mean of the S results.
    """
    total_TE = torch.zeros_like(logits_TE)
    for noise_E in noise_SE:
        total_TE = total_TE + gumbel_softmax(logits_TE, noise_E, temperature)
    return total_TE / len(noise_SE)


def evaluation_noise(num_samples: int, num_experts: int) -> Tensor:
    """(S, E) fp32 Gumbel noise on CPU, always the same.

    GG MoE draws anew for every example. Here all tokens share one set of draws, so that a token's weights depend neither on
    a seed nor on its place in the batch, and generation with a cache equals one pass over the text. Shared noise would
    favour some experts for all tokens; therefore every expert has the same S values, the quantiles of the distribution
    at (s + 1/2) / S, each in an order of its own (a Latin hypercube).
    """
    quantiles_S = (torch.arange(num_samples) + 0.5) / num_samples
    order_SE = torch.rand(num_samples, num_experts, generator=torch.Generator().manual_seed(0)).argsort(0)
    return -(-quantiles_S.log()).log()[order_SE]
