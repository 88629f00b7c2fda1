"""Which layouts of a job fit into memory, and how fast each is predicted to be.

Searches expert-parallel degree, ZeRO stage, micro-batch and activation checkpointing. Parameters come from the real model on
the meta device, activations from dry runs of a few layers of it, continued in a straight line: what forward keeps grows by the
same number of bytes with each layer of a kind and with each sequence, and what backward needs on top does not depend on the
number of layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from moe.layer import moe_layers
from moe.scaling.dry_run import StepBytes, simulated_model, step_bytes
from moe.scaling.hardware import Hardware
from moe.scaling.memory import MemoryPlan, engine_bytes, plan_memory
from moe.scaling.shape import Layout, ModelShape, OwnedParameters, owned_parameters
from moe.scaling.timing import ModelFlops, StepTime, predict
from moe.scaling.traffic import Traffic, plan_traffic

Groups = Callable[[nn.Module], list[list[str]]]
"""Parameter names of each optimizer group of a model."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout with what is predicted for it."""

    layout: Layout
    memory: MemoryPlan
    traffic: Traffic
    time: StepTime
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """What may be chosen; the defaults are everything that divides.

    Attributes:
        ep_sizes, zero_stages, micro_batch_sizes, recompute: values to try.
    """

    ep_sizes: tuple[int, ...] | None = None
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    micro_batch_sizes: tuple[int, ...] | None = None
    recompute: tuple[bool, ...] = (False, True)


class Planner:
    """Plans layouts of one model on one kind of machine.

    Args:
        shape: the model.
        hardware: GPU, links and assumptions.
        base: what the layouts have in common: world size, precision, GPUs per node, DeepSpeed options, exchange.
        batch_size: sequences of an optimizer step over all GPUs.
        optimizer_groups: as the trainer makes them.
        report: receives one line per dry run.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        base: Layout,
        batch_size: int,
        optimizer_groups: Groups,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.shape, self.hardware, self.base, self.batch_size = shape, hardware, base, batch_size
        self._groups, self._report = optimizer_groups, report
        self._owned: dict[int, OwnedParameters] = {}
        self._steps: dict[tuple[int, bool], dict[tuple[int, int, int], StepBytes]] = {}

    @cached_property
    def top_k(self) -> int:
        """Experts per token."""
        model = self.shape.with_layers(0, 1).build() if self.shape.moe is not None else None
        return 0 if model is None else round(next(iter(moe_layers(model).values())).router.mean_experts_per_token)

    def owned(self, ep_size: int) -> OwnedParameters:
        """Parameters of a rank."""
        if ep_size not in self._owned:
            layout = replace(self.base, ep_size=ep_size, activation_checkpointing=False)
            with simulated_model(self.shape, layout) as (model, _):
                local = sum(p.numel() for layer in moe_layers(model).values() for p in layer.experts.parameters())
                total = sum(p.numel() for p in model.parameters()) + local * (ep_size - 1)
                self._owned[ep_size] = owned_parameters(model, self._groups(model), total)
        return self._owned[ep_size]

    @cached_property
    def flops(self) -> ModelFlops:
        """FLOPs of a token."""
        owned, decoder, length = self.owned(1), self.shape.decoder, self.shape.seq_len
        parts = owned.by_part()
        experts = parts.get("routed experts", 0)
        active = experts * self.top_k / self.shape.moe.num_experts if self.shape.moe is not None else 0.0
        head = decoder.vocab_size * decoder.hidden_size
        dense = sum(number for part, number in parts.items() if part not in ("embedding", "norm", "routed experts"))
        heads = decoder.num_attention_heads
        width = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
        key = getattr(decoder, "qk_head_dim", None) or width
        value = getattr(decoder, "v_head_dim", None) or width
        return ModelFlops(
            dense=dense + head,
            head=head,
            expert=active,
            attention=self.shape.num_layers * length * heads * (key + value),
            total=6 * (dense + head + active) + 12 * self.shape.num_layers * decoder.hidden_size * length,
        )

    def step_bytes(self, layout: Layout) -> StepBytes:
        """Bytes of a micro-batch of the whole model, continued from dry runs of a few layers."""
        num_moe, num_dense = self.shape.num_moe_layers, self.shape.num_layers - self.shape.num_moe_layers
        dense, moe = min(num_dense, 1), min(num_moe, 2)
        dense = dense if moe else 2
        runs = self._runs(layout, [(dense, moe, 1), (dense, moe, 2)])
        base, double = runs[dense, moe, 1], runs[dense, moe, 2]
        batch = layout.micro_batch_size
        steps = {"moe": num_moe - moe, "dense": num_dense - dense}
        saved, exchange, resident = (
            _line(getattr(base, name), getattr(double, name), batch) for name in ("saved", "exchange", "resident")
        )
        above, later = (
            _line(getattr(base, name) - base.saved, getattr(double, name) - double.saved, batch)
            for name in ("peak", "later_peak")
        )
        for kind, number in steps.items():
            if number == 0:
                continue
            fewer = (dense, moe - 1, 1) if kind == "moe" and moe == 2 else (dense + 1, moe, 1)
            more = (dense, moe, 1) if kind == "moe" and moe == 2 else fewer
            less = fewer if more != fewer else (dense, moe, 1)
            found = self._runs(layout, [more, less])
            saved += batch * number * (found[more].saved - found[less].saved)
            exchange += batch * number * (found[more].exchange - found[less].exchange)
        return StepBytes(
            saved=saved,
            exchange=exchange,
            peak=saved + above,
            later_peak=saved + later,
            resident=resident,
            transfers=base.transfers,
        )

    def _runs(self, layout: Layout, wanted: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int, int], StepBytes]:
        """Dry runs by (dense layers, MoE layers, sequences)."""
        known = self._steps.setdefault((layout.ep_size, layout.activation_checkpointing), {})
        for num_dense, num_moe, batch in wanted:
            if (num_dense, num_moe, batch) not in known:
                self._report(
                    f"dry run: EP {layout.ep_size}, recompute {'on' if layout.activation_checkpointing else 'off'}, "
                    f"{num_dense} dense and {num_moe} MoE layers, {batch} sequences"
                )
                small = replace(layout, world_size=layout.ep_size, micro_batch_size=batch)
                known[num_dense, num_moe, batch] = step_bytes(self.shape.with_layers(num_dense, num_moe), small)
        return known

    def plan(self, layout: Layout, imbalance: float = 1.0) -> Candidate:
        """Predict one layout."""
        owned = self.owned(layout.ep_size)
        step, engine = self.step_bytes(layout), engine_bytes(owned, layout)
        kept = self.step_bytes(replace(layout, activation_checkpointing=False)).saved
        memory = plan_memory(engine, step, layout)
        traffic = plan_traffic(self.shape, layout, owned, self.top_k)
        time = predict(self.shape, layout, self.flops, kept, engine, traffic, self.hardware, imbalance)
        room = self.hardware.memory_bytes - self.hardware.reserved_bytes
        return Candidate(layout=layout, memory=memory, traffic=traffic, time=time, fits=memory.peak <= room)

    def layouts(self, search: Search) -> list[Layout]:
        """All layouts that divide.

        Raises:
            ValueError: there is none.
        """
        world, spec = self.base.world_size, self.shape.moe
        if self.batch_size % world:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not divisible by {world} GPUs; make it a multiple of {world}"
            )
        per_gpu = self.batch_size // world
        degrees = [d for d in range(1, world + 1) if world % d == 0 and spec is not None and spec.num_experts % d == 0]
        degrees = degrees or [1]
        sizes = [size for size in range(1, per_gpu + 1) if per_gpu % size == 0]
        if search.ep_sizes is not None:
            degrees = [degree for degree in degrees if degree in search.ep_sizes]
        if search.micro_batch_sizes is not None:
            sizes = [size for size in sizes if size in search.micro_batch_sizes]
        if not degrees or not sizes:
            raise ValueError(
                f"nothing to choose from: parallel.ep_size must divide {world} GPUs"
                + (f" and moe.num_experts={spec.num_experts}" if spec else "")
                + f", and train.micro_batch_size must divide the {per_gpu} sequences of a GPU"
            )
        return [
            replace(
                self.base,
                ep_size=degree,
                zero_stage=stage,
                micro_batch_size=size,
                grad_accum=per_gpu // size,
                activation_checkpointing=recompute,
            )
            for degree in degrees
            for recompute in search.recompute
            for stage in search.zero_stages
            for size in sizes
        ]

    def search(self, search: Search) -> list[Candidate]:
        """All layouts, the fastest that fits first; those that do not fit follow, the smallest first."""
        found = [self.plan(layout) for layout in self.layouts(search)]
        return sorted(found, key=lambda c: (not c.fits, c.time.total if c.fits else c.memory.peak))


def _line(one: int, two: int, batch: int) -> int:
    """Value at ``batch`` of the straight line through the values at 1 and 2."""
    return one + (two - one) * (batch - 1)


def overrides(layout: Layout) -> list[str]:
    """A layout as settings for ``moe train CONFIG``."""
    return [
        f"parallel.ep_size={layout.ep_size}",
        f"parallel.zero_stage={layout.zero_stage}",
        f"train.micro_batch_size={layout.micro_batch_size}",
        f"train.activation_checkpointing={str(layout.activation_checkpointing).lower()}",
    ]
