"""Time and memory of one implementation on one case, on the GPU."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_layer.implementations import Inputs
from benchmarks.gpu_layer.shapes import Case, draw_experts


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians over repeats.

    Attributes:
        forward_ms: forward in training mode, with what it keeps for backward.
        full_ms: forward and backward, all gradients.
        peak_gib: memory above what was there before (leaves and their gradients), at the worst moment of a step.
        kept_gib: bytes that autograd keeps between forward and backward, other than leaves.
        noise: (p80 - p20) / median of the full step.
    """

    forward_ms: float
    full_ms: float
    peak_gib: float
    kept_gib: float
    noise: float


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 1111) -> Inputs:
    """As SonicMoE's benchmark draws them: x and dy 0.2 * normal, weights 0.02 * normal."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype)

    height = (2 if case.activation == "swiglu" else 1) * case.hidden
    weights_TK = torch.rand(case.num_tokens, case.top_k, device=device, generator=generator) + 0.1
    leaves = (
        normal(0.2, case.num_tokens, case.dim),
        weights_TK / weights_TK.sum(-1, keepdim=True),
        normal(0.02, case.num_experts, height, case.dim),
        normal(0.02, case.num_experts, case.dim, case.hidden),
    )
    x_TD, weights_TK, w_up_EHD, w_down_EDF = (leaf.requires_grad_() for leaf in leaves)
    return Inputs(
        x_TD=x_TD,
        weights_TK=weights_TK,
        w_up_EHD=w_up_EHD,
        w_down_EDF=w_down_EDF,
        experts_TK=draw_experts(case, device, generator),
        dy_TD=normal(0.2, case.num_tokens, case.dim),
        activation=case.activation,
    )


def kept_bytes(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Bytes of the different storages that autograd saves in ``run``, without those of the leaves."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = run()
    del keep_alive
    return sum(found.values())


def _milliseconds(run: Callable[[], object], repeats: int, flush: Tensor) -> list[float]:
    """Device time of each repeat; the L2 cache is overwritten before it."""
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def measure(implementation: Callable[[Inputs], Tensor], inputs: Inputs, repeats: int) -> Cost:
    """Warm up, then time forward, then forward and backward, then memory."""
    leaves = [leaf for leaf in inputs.leaves if leaf.requires_grad]

    def forward() -> Tensor:
        return implementation(inputs)

    def full() -> None:
        torch.autograd.grad(implementation(inputs), leaves, inputs.dy_TD, allow_unused=True)

    flush = torch.empty(2**27, dtype=torch.int8, device=inputs.x_TD.device)
    for _ in range(3):
        full()
    forward_ms = _milliseconds(forward, repeats, flush)
    full_ms = _milliseconds(full, repeats, flush)
    del flush
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    full()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kept = kept_bytes(forward, [*inputs.leaves, inputs.experts_TK, inputs.dy_TD])
    median = statistics.median(full_ms)
    fifths = statistics.quantiles(full_ms, n=5)
    return Cost(
        forward_ms=statistics.median(forward_ms),
        full_ms=median,
        peak_gib=peak / 2**30,
        kept_gib=kept / 2**30,
        noise=(fifths[-1] - fifths[0]) / median,
    )
