"""Fine-grained upcycling with virtual groups (arXiv 2410.07524), and with shards that every token passes.

The FFN is cut into G shards of F / G neurons, of which S are shared and g = G - S routed. Expert j is a copy of routed shard
j mod g, and the gate's rows of experts jg ... jg + g - 1 are equal: a token that chooses one of them chooses them all, so its
top-k, a multiple of g, holds every shard equally often and with equal weights. With weights that sum to 1 the routed part is
1 / g of the sum of its shards, so their down-projections are multiplied by g: the output is that of the dense FFN.

The paper divides the factor over all matrices; only the factor on the down-projection is exact for SwiGLU. In bf16 and fp16
the product is exact for powers of two. A gate that is computed in bf16, as stock architectures do in bf16 models, gives different
groups equal logits for some tokens; top-k may then take parts of two groups. `MoELayer` computes its gate in fp32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN
from moe.convert.upcycle.method import Upcycler
from moe.convert.upcycle.options import UpcycleOptions


class VirtualGroup(Upcycler):
    """Experts are copies of shards."""

    name = "virtual-group"
    summary = (
        "The dense FFN is cut into shards; every expert is a copy of one, and the gate's rows are equal within a group of "
        "experts that holds every shard once (virtual groups, arXiv 2410.07524)."
    )
    uses = frozenset({"granularity", "num_shared"})

    def check(self, options: UpcycleOptions, width: int, num_sources: int) -> None:
        """G divides the width; G - S is positive and divides E and K."""
        super().check(options, width, num_sources)
        granularity, group = options.granularity, group_size(options)
        if granularity < 2:
            raise ValueError(
                f"--method virtual-group needs --granularity of at least 2; {granularity} is --method copy"
            )
        if width % granularity:
            divisors = [n for n in range(2, 65) if width % n == 0]
            raise ValueError(
                f"--granularity {granularity} does not divide the FFN width {width}; use one of {divisors}"
            )
        if group < 1:
            raise ValueError(f"--shared {options.num_shared} must be below --granularity {granularity}")
        for flag, value in (("--experts", options.num_experts), ("--top-k", options.top_k)):
            if value % group:
                raise ValueError(
                    f"{flag} {value} is not a multiple of the {group} routed shards (--granularity {granularity}, "
                    f"--shared {options.num_shared})"
                )
        if options.router_std == 0 and options.top_k < options.num_experts:
            raise ValueError("--router-std 0 makes all groups tie, so that a token may get one shard twice; use 0.02")

    def keeps_function(self, options: UpcycleOptions, width: int, dtype: torch.dtype) -> bool:
        """Where the factor on the down-projection rounds nothing."""
        group = group_size(options)
        return dtype in (torch.float32, torch.float64) or group & (group - 1) == 0

    def experts(
        self, sources: Sequence[DenseFFN], options: UpcycleOptions, random: torch.Generator
    ) -> Iterator[DenseFFN]:
        """The routed shards in order, as often as they fit."""
        group = group_size(options)
        for expert in range(options.num_experts):
            first = options.num_shared + expert % group
            shard = cut(sources[0], first, first + 1, options.granularity)
            yield DenseFFN(gate_FD=shard.gate_FD, up_FD=shard.up_FD, down_DF=shard.down_DF * group)

    def shared(self, sources: Sequence[DenseFFN], options: UpcycleOptions) -> DenseFFN | None:
        """The first S shards as they are."""
        if options.num_shared == 0:
            return None
        return cut(sources[0], 0, options.num_shared, options.granularity)

    def gate(self, dim: int, options: UpcycleOptions, random: torch.Generator) -> Tensor:
        """(E, D): one row per group, g times."""
        group = group_size(options)
        rows = torch.randn(options.num_experts // group, dim, generator=random) * options.router_std
        return rows.repeat_interleave(group, 0)


def group_size(options: UpcycleOptions) -> int:
    """g, routed shards."""
    return options.granularity - options.num_shared


def cut(ffn: DenseFFN, first: int, end: int, granularity: int) -> DenseFFN:
    """Shards ``first`` to ``end`` (not included) of an FFN in ``granularity`` of them, as views."""
    width = ffn.width // granularity
    neurons = slice(first * width, end * width)
    return DenseFFN(
        gate_FD=None if ffn.gate_FD is None else ffn.gate_FD[neurons],
        up_FD=ffn.up_FD[neurons],
        down_DF=ffn.down_DF[:, neurons],
    )
