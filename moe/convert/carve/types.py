"""What carving methods take and give.

A neuron is one of the F hidden units of an FFN: a row of the gate and up-projections and a column of the down-projection.

Legend: T calibration tokens, D model, F neurons, R routed experts, m neurons of an expert.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CarveShape:
    """How many experts, and how many run per token.

    Attributes:
        num_experts: all experts, shared ones included, of equal width.
        num_shared: S, experts that every token passes.
        top_k: K, routed experts per token.
    """

    num_experts: int
    num_shared: int
    top_k: int

    @property
    def num_routed(self) -> int:
        """R."""
        return self.num_experts - self.num_shared

    @property
    def active_share(self) -> float:
        """Neurons that run, of all."""
        return (self.num_shared + self.top_k) / self.num_experts

    def check(self, width: int) -> int:
        """Neurons of an expert, m, in an FFN of ``width``.

        Raises:
            ValueError: impossible; names the option and what is possible.
        """
        if self.num_experts < 2 or not 0 <= self.num_shared < self.num_experts - 1:
            raise ValueError(
                f"--experts {self.num_experts} --shared {self.num_shared} leaves {self.num_routed} routed experts; "
                "at least 2 are needed"
            )
        if not 1 <= self.top_k <= self.num_routed:
            raise ValueError(f"--top-k {self.top_k} must lie between 1 and the {self.num_routed} routed experts")
        if width % self.num_experts:
            divisors = [n for n in range(2, 257) if width % n == 0]
            raise ValueError(
                f"--experts {self.num_experts} does not divide the FFN width {width}; use one of {divisors}"
            )
        return width // self.num_experts


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a method sees of one layer on the calibration text.

    Attributes:
        x_TD: fp32 inputs of the FFN (after the layer's norm).
        weights_T: fp32, how much a token's output error counts: 1 / mean(residual stream after the layer ** 2). Without it the
            few tokens of huge norm (such as the first) dominate every least-squares problem.
        sequence_T: int64, the calibration window that a token is of.
    """

    x_TD: Tensor
    weights_T: Tensor
    sequence_T: Tensor


@dataclass(frozen=True, kw_only=True)
class LinearGate:
    """Scores x W^T + b; the K best experts run, each with weight 1. Stock architectures express it (GLM4-MoE).

    Attributes:
        weight_RD: fp32.
        bias_R: fp32.
    """

    weight_RD: Tensor
    bias_R: Tensor


@dataclass(frozen=True, kw_only=True)
class NeuronGate:
    """CMoE's gate: |(Wu x) * silu(Wg x)| of one representative neuron per expert (arXiv 2502.04416). Ours only.

    Attributes:
        gate_RD, up_RD: fp32 rows of the representative neurons.
    """

    gate_RD: Tensor
    up_RD: Tensor


@dataclass(frozen=True, kw_only=True)
class Carving:
    """Which neuron goes where, and how tokens find them.

    Attributes:
        shared_M: int64 neurons of the shared experts, S * m of them.
        routed_RM: (R, m) int64 neurons of the routed experts.
        gate: chooses the routed experts.
        down_DF: refitted down-projection in the order of the dense one; ``None`` keeps the dense one.
        notes: figures for the report, by name.
    """

    shared_M: Tensor
    routed_RM: Tensor
    gate: LinearGate | NeuronGate
    down_DF: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def check(self, width: int) -> None:
        """Every neuron is in exactly one expert."""
        everyone = torch.cat((self.shared_M, self.routed_RM.flatten())).sort().values
        assert torch.equal(everyone, torch.arange(width)), "a neuron is in no expert or in two"
