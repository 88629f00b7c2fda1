"""The shapes that SonicMoE, ScatterMoE and Liger publish, and routings that are balanced, skewed, and nearly collapsed.

Legend: T tokens, D model, F expert FFN, E experts, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "one expert")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to measure.

    Attributes:
        table: which published table it is from (A, B: SonicMoE; C: released models; F: ScatterMoE; G: Liger).
        activation: ScatterMoE's table has plain GELU experts.
        routing: one of `ROUTINGS`.
    """

    table: str
    num_tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    routing: str = "uniform"

    @property
    def flop_forward(self) -> float:
        """SonicMoE's convention: matmuls only, 6TFKD for SwiGLU; the backward counts twice that (arXiv 2512.14080)."""
        matmuls = 3 if self.activation == "swiglu" else 2
        return 2.0 * matmuls * self.num_tokens * self.hidden * self.top_k * self.dim

    @property
    def kept_gib(self) -> float:
        """What a backward that keeps x, the pre-activation and indices has to keep, in bf16."""
        rows = self.num_tokens * self.top_k
        height = (2 if self.activation == "swiglu" else 1) * self.hidden
        indices = 4 * (3 * rows + self.num_experts + 1) + 4 * rows
        return (2 * self.num_tokens * self.dim + 2 * rows * height + indices) / 2**30


def _case(table: str, sizes: tuple[int, int, int, int, int], **rest: str) -> Case:
    num_tokens, dim, hidden, num_experts, top_k = sizes
    return Case(
        table=table, num_tokens=num_tokens, dim=dim, hidden=hidden, num_experts=num_experts, top_k=top_k, **rest
    )


_A = [
    (tokens, dim, hidden, experts, top_k)
    for tokens, dim, rows in (
        (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
        (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    )
    for hidden, experts, top_k in rows
]
_B = [(32768, 4096, 1024, 128, 8), (32768, 4096, 1536, 128, 8), (32768, 2048, 1024, 64, 8), (32768, 2048, 512, 256, 32)]
# OLMoE-1B-7B, gpt-oss-20b, Qwen3-30B-A3B, Qwen3-Next-80B-A3B, Qwen3-235B-A22B, DeepSeek-V3 (from their config files)
_C = [
    (16384, 2048, 1024, 64, 8),
    (16384, 2880, 2880, 32, 4),
    (32768, 2048, 768, 128, 8),
    (16384, 2048, 512, 512, 10),
    (16384, 4096, 1536, 128, 8),
    (8192, 7168, 2048, 256, 8),
]
_F = [(16384, 4096, 8192 // k, 8 * k, k) for k in (1, 2, 4, 8, 16)] + [
    (2048 * b, 4096, 1024, 64, 8) for b in (2, 8, 16, 30)
]
_G = [(128 * 4**i, 2048, 768, 128, 8) for i in range(5)] + [
    (8192, 2048, 768, experts, 8) for experts in (8, 16, 32, 64)
]

# The row that the targets name comes first, then the others by table: a run that is cut short has what matters.
TARGET = _case("G", (32768, 2048, 768, 128, 8))
CASES = [
    TARGET,
    *(_case("A", sizes) for sizes in _A),
    *(_case("B", sizes) for sizes in _B),
    *(_case("G", sizes) for sizes in _G),
    *(_case("C", sizes) for sizes in _C),
    *(_case("F", sizes, activation="gelu") for sizes in _F),
    *(_case("B", _B[0], routing=routing) for routing in ROUTINGS[1:]),
    *(_case("G", (32768, 2048, 768, 128, 8), routing=routing) for routing in ROUTINGS[1:]),
]
QUICK_CASES = [_case("quick", (48, 64, 32, 4, 2), routing=routing) for routing in ROUTINGS]


def draw_experts(case: Case, device: torch.device, generator: torch.Generator) -> Tensor:
    """(T, K) int64 different experts per token: by Gumbel top-k from the routing's probabilities."""
    rank_E = torch.arange(1, case.num_experts + 1, device=device, dtype=torch.float32)
    if case.routing == "uniform":
        logits_E = torch.zeros_like(rank_E)
    elif case.routing == "zipf":
        logits_E = -rank_E.log()
    else:
        logits_E = torch.where(rank_E == 1, 20.0, 0.0)  # every token has expert 0, and K - 1 others
    noise_TE = torch.rand(case.num_tokens, case.num_experts, device=device, generator=generator).clamp_min(1e-20)
    return (logits_E - (-noise_TE.log()).log()).topk(case.top_k, dim=-1).indices
