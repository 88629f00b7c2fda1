"""The bridge to DeepSpeed: our layer presented to its engine as one of its own, and one way to make and step an engine.

DeepSpeed decides that a model has experts by ``isinstance(module, AutoEPMoELayer)``; it then creates expert groups and
keeps expert parameters, known by attributes, out of the data-parallel reduction. So an expert-parallel `MoELayer` gets a
class that is both (by assigning ``__class__``, as torch's FSDP2 does) and brings its own forward. All names here that
DeepSpeed does not document are used in this file only, and pyproject pins the range they were tested with (0.19.8).

ZeRO 0 needs help: DeepSpeed clips by the norm of a rank's own experts there, which differs from rank to rank, so replicas
drift apart. `Engine.step` clips by the true global norm instead.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from moe.layer import MoELayer, moe_layers
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.exchange.backends import make_exchange
from moe.parallel.exchange.config import ExchangeConfig


class _EngineMoELayer(MoELayer, AutoEPMoELayer):
    """A `MoELayer` that DeepSpeed's engine takes for an AutoEP layer; made by assigning ``__class__``, never constructed."""

    ep_size: int
    ep_rank: int
    ep_group_name: str
    exchange_config: ExchangeConfig
    name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False, **_: Any) -> None:
        """Called by the engine once its groups exist; creates the expert groups and the exchange."""
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        group = groups._get_expert_parallel_group(self.ep_group_name)
        self.exchange = make_exchange(group, self.ep_rank, self.ep_size, self.exchange_config, self.name)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether the parameter holds only this rank's experts."""
    return getattr(parameter, "allreduce", True) is False


def shard_experts(model: nn.Module, ep_size: int, exchange: ExchangeConfig | None = None) -> None:
    """Keep this rank's experts of every MoE layer, in place, and mark them for the engine.

    Ranks r * ep_size ... (r + 1) * ep_size - 1 form expert group r; rank i of a group holds experts
    [i * E / ep_size, (i + 1) * E / ep_size).

    Raises:
        ValueError: the number of experts or of ranks is not divisible by ``ep_size``.
    """
    world_size = dist.get_world_size()
    if world_size % ep_size:
        raise ValueError(
            f"parallel.ep_size={ep_size} does not divide the {world_size} processes; use a divisor or start more"
        )
    for layer_name, layer in moe_layers(model).items():
        layer.reduce_counts = all_reduce_sum
        if ep_size == 1:
            continue
        if layer.num_experts % ep_size:
            raise ValueError(f"moe.num_experts={layer.num_experts} is not divisible by parallel.ep_size={ep_size}")
        ep_rank, num_local = dist.get_rank() % ep_size, layer.num_experts // ep_size
        group_name = f"ep_size_{ep_size}"
        for name, parameter in list(layer.experts.named_parameters()):
            local = nn.Parameter(parameter.detach()[ep_rank * num_local : (ep_rank + 1) * num_local].clone())
            local.allreduce = False  # type: ignore[attr-defined]
            local.group_name = group_name  # type: ignore[attr-defined]
            local.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            local.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]
            setattr(layer.experts, name, local)
        layer.__class__ = _EngineMoELayer
        layer.ep_size, layer.ep_rank, layer.ep_group_name = ep_size, ep_rank, group_name  # type: ignore[assignment]
        layer.exchange_config, layer.name = exchange or ExchangeConfig(), layer_name  # type: ignore[assignment]


class Engine:
    """A DeepSpeed engine around a model whose experts are sharded over ``ep_size`` ranks.

    Args:
        model: on CPU, with all experts, the same on every rank; it is changed in place.
        param_groups: optimizer groups, each with a unique "name" and "params" as parameter *names* (experts are replaced
            by their local shards before the optimizer sees them).
        optimizer_class, optimizer_options: the torch optimizer.
        config: DeepSpeed's JSON; ``zero_optimization.stage`` and ``gradient_clipping`` are read here.
        ep_size: ranks that share one set of experts.
        exchange: how tokens travel to them.
    """

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_options: dict[str, Any],
        config: dict[str, Any],
        ep_size: int,
        exchange: ExchangeConfig | None = None,
    ) -> None:
        self.model, self.ep_size = model, ep_size
        self.zero_stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self._clip = float(config.get("gradient_clipping", 0.0))
        shard_experts(model, ep_size, exchange)
        parameters = dict(model.named_parameters())
        param_groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in param_groups]
        if ep_size > 1:
            param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
        param_groups = [group for group in param_groups if group["params"]]
        if self.zero_stage == 0:
            config = {**config, "gradient_clipping": 0.0}
        elif self.zero_stage == 3 and moe_layers(model):
            # DeepSpeed hooks into tensors that a module returns; a router returns a dataclass. As leaves, whole MoE layers
            # are gathered for forward and backward.
            set_z3_leaf_modules(model, list({type(layer) for layer in moe_layers(model).values()}))
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=param_groups,
            optimizer=optimizer_class(param_groups, **optimizer_options),
            # Its own CPU Adam would have to be compiled; torch's fused one is as good on offloaded states.
            config={**config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        )
        if hasattr(self.optimizer, "fp32_groups"):
            _undo_first_step(self.optimizer)
        if self.zero_stage > 0:
            # A non-finite gradient then skips the step on all ranks; by default only fp16 is checked.
            self.optimizer.check_grad_overflow = True
        self.grad_norm: float = 0.0

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; gradients are averaged over micro-batches and data-parallel ranks."""
        self.module.backward(loss)

    def step(self) -> bool:
        """Clip and update at the end of gradient accumulation (a no-op before); whether the weights changed.

        ``grad_norm`` is then the global norm before clipping. A step with a non-finite gradient is skipped on all ranks.
        """
        boundary = self.module.is_gradient_accumulation_boundary()
        applied = True
        if boundary and self.zero_stage == 0:
            applied = self._clip_replicated()
        self.module.step()
        if boundary and self.zero_stage > 0:
            norm = self.module.get_global_grad_norm()
            self.grad_norm = float(norm) if norm is not None else float("nan")
            applied = self.module.was_step_applied()
        return applied

    def _clip_replicated(self) -> bool:
        """Clip gradients that every rank holds whole (ZeRO 0), by the norm over all experts of all ranks."""
        shared: list[Tensor] = []
        experts: list[Tensor] = []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                (experts if is_expert_parameter(parameter) else shared).append(parameter.grad)
        squares = torch.stack([_sum_of_squares(shared), _sum_of_squares(experts)])
        if self.ep_size > 1:
            squares[1:] = all_reduce_sum(squares[1:], groups._get_expert_parallel_group(f"ep_size_{self.ep_size}"))
        norm = squares.sum().sqrt()
        self.grad_norm = float(norm)
        if not torch.isfinite(norm):
            self.model.zero_grad(set_to_none=True)  # the optimizer then has nothing to do
            return False
        if self._clip and norm > self._clip:
            torch._foreach_mul_(shared + experts, self._clip / (norm + 1e-6))
        return True

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model by name; of an expert-parallel layer, this rank's experts."""
        yield from self.model.named_parameters()


def _undo_first_step(optimizer: Any) -> None:
    """DeepSpeed's optimizer for bf16 at ZeRO 0 makes its states by a step without gradients; it counts, and decays weights."""
    optimizer.optimizer.state.clear()
    for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        torch._foreach_copy_([master.data for master in full], [weight.data for weight in low])


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors])).square().sum()
