"""The MoE layer: route -> (exchange) -> experts -> combine, plus shared experts; needs only torch.

The layer at expert-parallel degree 1 and n is the same code but for ``exchange``, which `moe.parallel` sets.

Legend: T tokens, D model, F expert FFN, E experts, S slots.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moe.errors import nearest
from moe.experts import ExpertBank, Later, SharedExperts
from moe.observe import LayerStats, RoutingContext, attach_loss, new_listener, optimizer_steps
from moe.routers import StepLoad, losses, parse_router
from moe.routers.assemble import routing_of_choices
from moe.routers.balance import BalanceConfig, update_bias
from moe.routers.capacity import apply_capacity
from moe.routers.check import check_input, check_routing, checks_enabled
from moe.types import AuxLoss, Routing, SoftRouting, TokenInfo


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Everything that turns a dense FFN into an MoE layer, and says which layers of a model become one.

    Attributes:
        num_experts: E, routed experts per layer.
        expert_hidden: F; by default the dense FFN's width divided by ``granularity``.
        granularity: G, how many times narrower an expert is than the dense FFN (arXiv 2402.07871); top_k = G then keeps
            the active FLOPs of the dense model.
        activation: "swiglu" or "gelu".
        num_shared_experts: experts of width F that every token passes, fused into one FFN.
        shared_gate: scale the shared experts' output by a learned sigmoid gate per token (Qwen2-MoE).
        first_dense_layers: leave this many layers at the bottom dense (DeepSeek-V3: 3).
        every: of the layers above, make every n-th one an MoE (Switch: 2).
        only_layers: make just these layers MoEs, by index from 0; in the place of the two above.
        capacity_factor: room of each expert in training relative to a balanced load; ``None`` drops nothing.
        eval_capacity_factor: the same in evaluation.
        drop_priority: who stays when there is no room, "choice" or "weight" (see `apply_capacity`).
        router: ``{"name": ..., option: value}``; see `moe.routers`.
        balance: balance losses and bias update.
    """

    num_experts: int = 8
    expert_hidden: int | None = None
    granularity: int = 1
    activation: Literal["swiglu", "gelu"] = "swiglu"
    num_shared_experts: int = 0
    shared_gate: bool = False
    first_dense_layers: int = 0
    every: int = 1
    only_layers: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    drop_priority: Literal["choice", "weight"] = "choice"
    router: dict[str, Any] = field(default_factory=lambda: {"name": "topk"})
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("num_experts", 1),
            ("granularity", 1),
            ("every", 1),
            ("num_shared_experts", 0),
            ("first_dense_layers", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"moe.{name}={getattr(self, name)} must be at least {least}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"moe.{name}={value} must be positive, or null to drop nothing")
        if self.only_layers is not None:
            if self.first_dense_layers or self.every != 1:
                raise ValueError(
                    "moe.only_layers says which layers are MoEs; leave out moe.first_dense_layers and moe.every"
                )
            if not self.only_layers or min(self.only_layers) < 0:
                raise ValueError(f"moe.only_layers={list(self.only_layers)} must be layers from 0, at least one")
        if self.activation not in ("swiglu", "gelu"):
            raise ValueError(f"moe.activation={self.activation!r} is unknown; use 'swiglu' or 'gelu'")
        if self.drop_priority not in ("choice", "weight"):
            raise ValueError(f"moe.drop_priority={self.drop_priority!r} is unknown; use 'choice' or 'weight'")
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("moe.shared_gate=true needs moe.num_shared_experts of at least 1")
        router_class, router_config = parse_router(self.router)
        with torch.device("meta"):  # checks what depends on the number of experts, such as top_k
            router = router_class(1, self.num_experts, router_config)
        if self.balance.bias_update_rate and not hasattr(router, "bias_E"):
            raise ValueError(
                f"moe.balance.bias_update_rate={self.balance.bias_update_rate} needs a router with a selection bias; "
                "set moe.router.selection_bias=true, use router noaux_tc, or set the rate to 0"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoESpec":
        """From plain data, as in YAML or a model's config.json; unknown keys are errors that name the nearest one."""
        values = dict(values)
        _check_keys("moe", values, cls)
        balance = values.get("balance", {})
        if isinstance(balance, dict):
            _check_keys("moe.balance", balance, BalanceConfig)
            values["balance"] = BalanceConfig(**balance)
        if values.get("only_layers") is not None:
            values["only_layers"] = tuple(sorted(values["only_layers"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        values = dataclasses.asdict(self)
        if self.only_layers is not None:
            values["only_layers"] = list(self.only_layers)  # as JSON has it
        return values

    def hidden(self, dense_hidden: int) -> int:
        """F of an expert in a model whose dense FFN has width ``dense_hidden``."""
        if self.expert_hidden is not None:
            return self.expert_hidden
        if dense_hidden % self.granularity:
            raise ValueError(
                f"moe.granularity={self.granularity} does not divide the dense FFN width {dense_hidden}; "
                "choose a divisor or set moe.expert_hidden"
            )
        return dense_hidden // self.granularity

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (from 0) gets experts."""
        if self.only_layers is not None:
            return layer in self.only_layers
        above = layer - self.first_dense_layers
        return above >= 0 and (above + 1) % self.every == 0


def _check_keys(path: str, values: dict[str, Any], owner: type) -> None:
    known = {f.name for f in dataclasses.fields(owner)}
    for key in values:
        if key not in known:
            raise ValueError(f"{path}.{key} is not an option; {nearest(str(key), known)}")


class Exchange(Protocol):
    """Runs the experts of a layer whose experts are spread over ranks; `moe.parallel.exchange` implements it."""

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertBank, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Weighted sum of each token's experts wherever they live: (T, D) -> (T, D).

        ``meanwhile`` may be called while tokens travel: the layer needs its result anyway, and it keeps it.
        """


class MoELayer(nn.Module):
    """A Mixture-of-Experts FFN.

    Args:
        dim: D.
        spec: what to build.
        dense_hidden: width of the dense FFN that it stands for; needed unless ``spec.expert_hidden`` is set.
        context: shared by all layers of a model; a layer used alone makes its own.

    Attributes:
        exchange: ``None`` where all experts are local.
        reduce_counts: sums an (E,) tensor over the data-parallel ranks; ``None`` on one rank.
        stats: statistics since the last optimizer step.
    """

    def __init__(
        self, dim: int, spec: MoESpec, dense_hidden: int | None = None, context: RoutingContext | None = None
    ) -> None:
        super().__init__()
        if dense_hidden is None and spec.expert_hidden is None:
            raise ValueError("moe.expert_hidden is not set and no dense_hidden was given; set one of them")
        hidden = spec.expert_hidden if dense_hidden is None else spec.hidden(dense_hidden)
        assert hidden is not None
        self.dim, self.spec, self.num_experts = dim, spec, spec.num_experts
        self.context = context or RoutingContext()
        router_class, router_config = parse_router(spec.router)
        self.router = router_class(dim, spec.num_experts, router_config)
        self.experts = ExpertBank(spec.num_experts, dim, hidden, spec.activation)
        self.shared_experts = (
            SharedExperts(dim, spec.num_shared_experts * hidden, spec.activation, spec.shared_gate)
            if spec.num_shared_experts
            else None
        )
        self.exchange: Exchange | None = None
        self.reduce_counts: Callable[[Tensor], Tensor] | None = None
        self.stats = LayerStats()
        self._global_counts_E: Tensor | None = None
        self._router_version: int | None = None
        self._listener = new_listener(self)
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Initialise all weights from the global RNG with deviation ``std`` (routers may have their own rule)."""
        self.router.reset_parameters(std)
        self.experts.reset_parameters(std)
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters(std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D). The second-last dimension is the sequence where the balance loss is per sequence."""
        num_sequences = max(x.shape[:-2].numel(), 1) if x.dim() > 2 else 1
        x_TD = x.reshape(-1, self.dim)
        if self.training and not torch.compiler.is_compiling():
            # Before routing: a checkpointed forward that runs again must find the same selection bias.
            notice_optimizer_step([self])
        info = TokenInfo(
            num_sequences=num_sequences,
            keep_T=self.context.token_mask_T,
            input_ids_T=self.context.input_ids_T,
            wants_probs=self._has_sequence_loss,
        )
        checked = checks_enabled()
        if checked:
            check_input(x_TD, type(self.router).__name__)
        routing = self.router(x_TD, info)
        if checked:
            check_routing(routing, x_TD.shape[0], type(self.router).__name__)
        num_dropped: Tensor | int = 0
        shared = None if self.shared_experts is None else Later(partial(self.shared_experts, x_TD))
        if isinstance(routing, SoftRouting):
            y_TD = self._forward_soft(x_TD, routing, shared)
        else:
            kept = self._apply_capacity(routing)
            y_TD, num_dropped = self._run_experts(x_TD, kept, shared), kept.num_dropped
            if routing.output_scale_D is not None:
                y_TD = y_TD * routing.output_scale_D.to(y_TD.dtype)
        if shared is not None:
            y_TD = y_TD + shared()
        if self.training and torch.is_grad_enabled():
            y_TD = self._attach_losses(y_TD, routing, num_sequences, num_dropped)
        return y_TD.view(x.shape)

    def _run_experts(self, x_TD: Tensor, routing: Routing, shared: Later | None) -> Tensor:
        if self.exchange is not None:
            return self.exchange(x_TD, routing, self.experts, shared)
        return self.experts(x_TD, routing)

    def _forward_soft(self, x_TD: Tensor, routing: SoftRouting, shared: Later | None) -> Tensor:
        """Slots are tokens with one expert each and weight 1, so they take the same road as sparse routings."""
        num_groups, num_members, num_slots = routing.dispatch_GMS.shape
        ids_GM = routing.token_ids_GM
        x_GMD = x_TD.view(num_groups, num_members, self.dim) if ids_GM is None else x_TD[ids_GM]
        slots_GSD = routing.dispatch_GMS.to(x_TD.dtype).transpose(1, 2) @ x_GMD
        expert_ids_S = torch.arange(num_slots, device=x_TD.device) // (num_slots // self.num_experts)
        expert_ids_N = expert_ids_S.repeat(num_groups)
        slot_routing = routing_of_choices(
            expert_ids_N[:, None], torch.ones(len(expert_ids_N), 1, device=x_TD.device), self.num_experts
        )
        out_GSD = self._run_experts(slots_GSD.reshape(-1, self.dim), slot_routing, shared).view_as(slots_GSD)
        y_GMD = routing.combine_GMS.to(out_GSD.dtype) @ out_GSD
        if ids_GM is None:
            return y_GMD.view_as(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=y_GMD.dtype)
        return y_TD.index_add(0, ids_GM.reshape(-1), y_GMD.view(-1, self.dim))

    def _apply_capacity(self, routing: Routing) -> Routing:
        factor = self.spec.capacity_factor if self.training else self.spec.eval_capacity_factor
        return routing if factor is None else apply_capacity(routing, factor, self.spec.drop_priority)

    def _attach_losses(
        self, y_TD: Tensor, routing: Routing | SoftRouting, num_sequences: int, num_dropped: Tensor | int
    ) -> Tensor:
        keep_T = self.context.token_mask_T
        counts_E = self._counts(routing, keep_T)
        balance = self.spec.balance
        is_global = balance.aux_coef > 0 and balance.aux_scope == "global_batch" and self.router.takes_balance_loss
        global_counts_E = self._reduced(counts_E) if is_global else None
        balance_counts_E = counts_E if global_counts_E is None else global_counts_E
        if self._global_counts_E is not None:
            balance_counts_E = balance_counts_E + self._global_counts_E
        aux_losses = dict(routing.aux_losses)
        aux_losses.update(self._balance_losses(routing, balance_counts_E, num_sequences, keep_T))
        total = torch.zeros((), device=y_TD.device)
        for loss in aux_losses.values():
            total = total + loss.coef * loss.value
        scalars = {f"loss/{name}": loss.value.detach() for name, loss in aux_losses.items()}
        scalars |= losses.observations(routing, keep_T)
        scalars["aux_loss"] = total.detach()
        scalars["dropped"] = torch.as_tensor(num_dropped, dtype=torch.float32, device=y_TD.device)
        scalars["assigned"] = counts_E.sum().float()
        scalars["tokens"] = counts_E.new_full((), y_TD.shape[0]).float() if keep_T is None else keep_T.sum().float()
        counts = [counts_E] if global_counts_E is None else [counts_E, global_counts_E]
        return attach_loss(y_TD, total, self._listener, counts, scalars)

    def on_backward(self, counts: list[Tensor], scalars: dict[str, Tensor]) -> None:
        """Add a micro-batch to the statistics; `attach_loss` calls it in backward."""
        counts_E, *rest = counts
        self.stats.add(counts_E, scalars)
        for global_counts_E in rest:
            seen_E = self._global_counts_E
            self._global_counts_E = global_counts_E if seen_E is None else seen_E + global_counts_E

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has statistics of its own."""
        super().__setstate__(state)
        self._listener = new_listener(self)

    def _balance_losses(
        self, routing: Routing | SoftRouting, counts_E: Tensor, num_sequences: int, keep_T: Tensor | None
    ) -> dict[str, AuxLoss]:
        balance, found = self.spec.balance, {}
        if isinstance(routing, Routing) and balance.aux_coef and self.router.takes_balance_loss:
            parts = num_sequences if self._has_sequence_loss else None
            if (value := losses.balance_loss(routing, counts_E, keep_T, parts)) is not None:
                found["switch"] = AuxLoss(value=value, coef=balance.aux_coef)
        if balance.z_coef and (z := losses.mean_z(routing, keep_T)) is not None:
            found["z"] = AuxLoss(value=z, coef=balance.z_coef)
        return found

    @property
    def _has_sequence_loss(self) -> bool:
        """Whether there is a balance loss that needs the probabilities of every token."""
        balance = self.spec.balance
        return balance.aux_coef > 0 and balance.aux_scope == "sequence" and self.router.takes_balance_loss

    def _counts(self, routing: Routing | SoftRouting, keep_T: Tensor | None) -> Tensor:
        if isinstance(routing, SoftRouting):  # every expert has the same number of slots
            num_groups, _, num_slots = routing.dispatch_GMS.shape
            slots_per_expert = num_groups * num_slots // self.num_experts
            return torch.full((self.num_experts,), slots_per_expert, device=routing.dispatch_GMS.device)
        if routing.stats is not None:
            return routing.stats.counts_E
        if keep_T is None:
            return routing.counts_E
        return losses.count_assignments(routing.expert_ids_N, self.num_experts, routing.token_ids_N, keep_T)

    def _reduced(self, counts_E: Tensor) -> Tensor:
        # A tensor of its own: torch.compile cannot pass one tensor twice to an autograd function.
        return counts_E.clone() if self.reduce_counts is None else self.reduce_counts(counts_E)

    def saw_optimizer_step(self) -> bool:
        """Whether an optimizer step was taken since this was last asked.

        Steps of `torch.optim` are counted; other optimizers show in the version counters of the router's weights.
        """
        version = optimizer_steps() + sum(parameter._version for parameter in self.router.parameters())
        before, self._router_version = self._router_version, version
        return before is not None and version != before

    def finish_step(self, applied: bool = True) -> LayerStats:
        """`finish_step` of this layer alone."""
        return finish_step([self], applied)[0]


def notice_optimizer_step(layers: list[MoELayer]) -> None:
    """Finish the step of layers that no training loop calls `finish_step` for, as under HF `Trainer`."""
    saw_step = [layer.saw_optimizer_step() for layer in layers]
    if any(saw_step) and any(layer.stats.num_micro_batches for layer in layers):
        finish_step(layers)


@torch.no_grad()
def finish_step(layers: Iterable[MoELayer], applied: bool = True) -> list[LayerStats]:
    """Close an optimizer step: move selection biases and what routers adapt, start new statistics, return the finished ones.

    Collective over the data-parallel ranks where ``reduce_counts`` is set and a router reads its load.

    Args:
        layers: all MoE layers of a model, so that routers that look at the whole model (ReMoE) can.
        applied: False when the step was skipped; biases and schedules then stay too.
    """
    layers = list(layers)
    finished = [layer.stats for layer in layers]
    for layer in layers:
        layer.stats, layer._global_counts_E = LayerStats(), None
    if not applied:
        return finished
    active = [(layer, stats) for layer, stats in zip(layers, finished, strict=True) if stats.counts_E is not None]
    loads = _global_loads(active)
    densities = [density for _, density in loads.values()]
    model_density = torch.stack(densities).mean() if densities else None
    for layer, stats in active:
        assert stats.counts_E is not None
        counts_E, _ = loads.get(id(layer), (stats.counts_E, None))
        if rate := layer.spec.balance.bias_update_rate:
            update_bias(layer.router.get_buffer("bias_E"), counts_E, rate)
        reduce = layer.reduce_counts or (lambda tensor: tensor)
        layer.router.after_step(StepLoad(counts_E=counts_E, model_density=model_density, reduce=reduce))
    return finished


def _global_loads(active: list[tuple[MoELayer, LayerStats]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Counts over all ranks, and the share of token-expert pairs that they are, of the layers whose routers read them.

    One collective for all layers.
    """
    wanted = [
        (layer, stats) for layer, stats in active if layer.spec.balance.bias_update_rate or layer.router.uses_load
    ]
    if not wanted:
        return {}
    parts = []
    for _, stats in wanted:
        assert stats.counts_E is not None
        parts += [stats.counts_E, stats.sums["tokens"].to(stats.counts_E)[None]]
    reduce = wanted[0][0].reduce_counts
    total = torch.cat(parts) if reduce is None else reduce(torch.cat(parts))
    loads = {}
    for (layer, _), numbers in zip(wanted, total.split([layer.num_experts + 1 for layer, _ in wanted]), strict=True):
        counts_E, num_tokens = numbers[:-1], numbers[-1].clamp_min(1)
        loads[id(layer)] = (counts_E, counts_E.sum() / (num_tokens * layer.num_experts))
    return loads


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
