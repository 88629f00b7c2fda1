"""Bytes that one GPU needs for a training step, by part, and at which moment of the step it needs most.

Activations and exchange buffers come from a dry run of the real code (`dry_run.py`). What DeepSpeed holds (weights, master
weights, moments, gradients, buckets) follows its rules as of 0.19.8, found by counting live tensors in its engine:

- ZeRO 0: AdamW on fp32 weights, or fp32 master weights beside bf16 ones; whole gradients; the all-reduce flattens a copy; at
  bf16 the step widens all gradients to fp32.
- ZeRO 1 and 2: one flat buffer of weights per optimizer group, fp32 masters and moments of a 1/D share of it. Gradients are
  moved through a bucket of ``reduce_bucket_size`` elements, which the reduction flattens once more, into a buffer of all the
  parameters that overlap the share. The step makes one group's gradients fp32. ZeRO 1 keeps whole gradients until then.
- ZeRO 3: every parameter is cut into D pieces; small ones stay whole as well, and up to ``stage3_max_live_parameters`` are
  whole at a time.

D is the number of replicas: all GPUs for dense parameters, world / ep_size for experts. Gradients are in the compute dtype.
Not counted: the CUDA context and library workspaces, the allocator's fragmentation (see `Hardware.reserved_bytes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moe.scaling.dry_run import StepBytes
from moe.scaling.shape import BYTES, Layout, OwnedParameter, OwnedParameters

# DeepSpeed's defaults, in elements; ``parallel.deepspeed.zero_optimization`` of a run may change them.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 1_000_000_000,
}
ALL_REDUCE_BUCKET = 500_000_000  # elements that the engine flattens at a time where ZeRO is off


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        weights: in the compute dtype, those that ZeRO 3 has gathered included.
        optimizer: fp32 master weights and both moments.
        gradients: what is held at the end of the last backward, before the step.
        activations: what forward keeps for backward, without the exchange.
        exchange: what forward keeps in the expert exchange.
        peak: most that is live at one moment. The parts do not add up to it: they are at their largest at different
            moments, and it has temporaries of backward, buckets and copies besides.
        moment: when that is: "backward", "reduction" or "step".
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    exchange: int
    peak: int
    moment: str


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """What DeepSpeed holds on one rank.

    Attributes:
        weights, optimizer: all the time.
        gathered: whole parameters of ZeRO 3 while the model runs.
        numel: parameters before ZeRO.
        held_before: gradients while backward runs at its fullest.
        held_after: gradients between the last backward and the step.
        bucket: buffers of the reduction while backward runs.
        flattened: copy that the reduction of one bucket makes.
        reduction: gradients and copies while the last gradients are reduced.
        step: gradients and copies during the optimizer step.
    """

    weights: int
    optimizer: int
    numel: int
    gathered: int = 0
    held_before: int = 0
    held_after: int = 0
    bucket: int = 0
    flattened: int = 0
    reduction: int = 0
    step: int = 0


def engine_bytes(owned: OwnedParameters, layout: Layout, rank: int | None = None) -> EngineBytes:
    """What DeepSpeed holds.

    Args:
        owned: this rank's parameters.
        layout: of the job.
        rank: whose share; ``None`` takes the largest one.
    """
    zero = zero_options(layout)
    if layout.zero_stage == 0:
        return _replicated(owned, layout)
    if layout.zero_stage == 3:
        return _partitioned_parameters(owned, layout, zero)
    return _partitioned_states(owned, layout, zero, rank)


def zero_options(layout: Layout) -> dict[str, int]:
    """DeepSpeed's options that decide sizes."""
    return {**ZERO_DEFAULTS, **{key: int(value) for key, value in layout.zero.items() if key in ZERO_DEFAULTS}}


def _replicated(owned: OwnedParameters, layout: Layout) -> EngineBytes:
    size, numel = BYTES[layout.precision], owned.numel
    experts = sum(p.numel for group in owned.groups for p in group if p.is_expert)
    flattened = size * min(max(experts, numel - experts), ALL_REDUCE_BUCKET)
    mixed = layout.precision != "fp32"
    return EngineBytes(
        weights=size * numel,
        optimizer=(12 if mixed else 8) * numel,
        numel=numel,
        held_before=size * numel if layout.grad_accum > 1 else 0,
        held_after=size * numel,
        reduction=size * numel + flattened,
        step=size * numel + (4 * numel if mixed else 0),
    )


def _replicas(group: Sequence[OwnedParameter], layout: Layout) -> int:
    return layout.expert_replicas if group[0].is_expert else layout.world_size


def _overlapping(group: Sequence[OwnedParameter], share: int, replicas: int, rank: int | None) -> int:
    """Elements of the parameters of which a rank owns a part; at most, over all ranks, where ``rank`` is None."""
    ends = list(accumulate(p.numel for p in group))

    def of(index: int) -> int:
        begin, end = index * share, (index + 1) * share
        return sum(p.numel for p, stop in zip(group, ends, strict=True) if stop > begin and stop - p.numel < end)

    if rank is not None:
        return of(rank)
    candidates = {min(begin // share, replicas - 1) for begin in (0, *ends)} | {0, replicas - 1}
    return max(of(index) for index in candidates | {max(index - 1, 0) for index in candidates})


def _partitioned_states(owned: OwnedParameters, layout: Layout, zero: dict[str, int], rank: int | None) -> EngineBytes:
    size, stage, many = BYTES[layout.precision], layout.zero_stage, layout.grad_accum > 1
    shares, copied = [], 0
    weights = 0
    for group in owned.groups:
        replicas = _replicas(group, layout)
        alignment = 2 * replicas
        whole = -(-sum(p.numel for p in group) // alignment) * alignment
        shares.append(whole // replicas)
        weights += size * whole
        own = None
        if rank is not None:
            own = rank // layout.ep_size if group[0].is_expert else rank
        copied += size * _overlapping(group, shares[-1], replicas, own)
    bucket, flattened = (size * n for n in (zero["reduce_bucket_size"], min(zero["reduce_bucket_size"], owned.numel)))
    earlier = copied if many else 0  # of the micro-batches before
    waiting = size * max(owned.numel - zero["reduce_bucket_size"], 0)
    widened = max(shares) * (size + 4 if size < 4 else size)
    return EngineBytes(
        weights=weights,
        optimizer=12 * sum(shares),
        numel=owned.numel,
        flattened=flattened,
        held_before=(size * owned.numel if many else 0) if stage == 1 else earlier,
        held_after=copied,
        bucket=bucket,
        reduction=bucket + flattened + (waiting + copied if stage == 1 else earlier + copied),
        step=copied + widened,
    )


def _partitioned_parameters(owned: OwnedParameters, layout: Layout, zero: dict[str, int]) -> EngineBytes:
    size = BYTES[layout.precision]
    pieces = small = large = largest = 0
    step_share = 0
    for group in owned.groups:
        replicas, share = _replicas(group, layout), 0
        for parameter in group:
            share += -(-parameter.numel // replicas)
            if replicas == 1:
                continue
            if parameter.numel <= zero["stage3_param_persistence_threshold"]:
                small += parameter.numel
            else:
                large, largest = large + parameter.numel, max(largest, parameter.numel)
        pieces += share
        step_share = max(step_share, min(share, zero["sub_group_size"]))
    bucket = size * zero["reduce_bucket_size"]
    flat = size * pieces
    return EngineBytes(
        weights=size * (pieces + small),
        optimizer=12 * pieces,
        numel=owned.numel,
        gathered=size * min(large, zero["stage3_max_live_parameters"] + largest),
        held_before=flat,
        held_after=flat,
        bucket=bucket,
        reduction=flat + bucket + size * min(zero["reduce_bucket_size"], owned.numel),
        step=flat + bucket + 4 * step_share,
    )


def plan_memory(engine: EngineBytes, step: StepBytes, layout: Layout) -> MemoryPlan:
    """Put both together; ``step`` is the dry run of the whole model."""
    temporaries = max(step.later_peak - step.saved, 0)
    # Whole gradients of ZeRO 0 and 1 grow while activations go; ZeRO 2 has its buffer once the first bucket is full.
    whole = BYTES[layout.precision] * engine.numel if layout.zero_stage < 2 else 0
    copied = engine.held_after + engine.flattened if layout.zero_stage == 2 else 0
    stays = engine.bucket if layout.zero_stage == 1 and layout.grad_accum > 1 else 0  # from the micro-batch before
    early = engine.held_before + stays + step.peak
    later = engine.bucket + max(
        engine.held_before + copied + step.later_peak, max(engine.held_before, whole) + temporaries
    )
    moments = {
        "backward": engine.gathered + max(early, later),
        "reduction": engine.gathered + engine.reduction,
        "step": engine.step,
    }
    moment = max(moments, key=lambda name: moments[name])
    peak = engine.weights + engine.optimizer + step.resident + moments[moment]
    return MemoryPlan(
        weights=engine.weights + engine.gathered,
        optimizer=engine.optimizer,
        gradients=engine.held_after,
        activations=step.saved - step.exchange,
        exchange=step.exchange,
        peak=peak,
        moment=moment,
    )
