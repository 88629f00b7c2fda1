"""Whole fp32 weights and optimizer states of single parameters, whatever ZeRO stage holds them in pieces.

DeepSpeed keeps fp32 master weights and moments flattened and partitioned. Its ``safe_get_full_*`` calls put one parameter
together; writing one back, and creating the moments before the first step, is done here. Everything in this file is
collective over the ranks that share the parameter, and must be called by all of them in the same order.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # who only reads a checkpoint needs no DeepSpeed
    from moe.parallel.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW


def full_gradient(parameter: nn.Parameter) -> Tensor:
    """Averaged gradient after backward and before the step, in fp32."""
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()


def full_weight(engine: "Engine", parameter: nn.Parameter) -> Tensor:
    """The fp32 master weight; of a frozen parameter, which has none, its own value."""
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad:
        return _frozen_weight(parameter)
    whole = safe_get_full_fp32_param(parameter)
    if whole is None:
        whole = _master(engine, parameter)
    return whole.detach().float()


def full_moment(engine: "Engine", parameter: nn.Parameter, key: str) -> Tensor:
    """An optimizer state of the parameter's shape; it exists after the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    whole = safe_get_full_optimizer_state(parameter, key)
    if whole is None:
        whole = engine.module.basic_optimizer.state[_master(engine, parameter)][key]
    return whole.detach().float()


def moments_of(engine: "Engine", parameter: nn.Parameter) -> tuple[str, ...]:
    """Optimizer states of the parameter's shape; a frozen one has none. An optimizer that is not Adam says so itself."""
    if not parameter.requires_grad:
        return ()
    own = getattr(engine.module.basic_optimizer, "moments_of", None)
    return MOMENTS if own is None else own(_master(engine, parameter))


def num_optimizer_steps(engine: "Engine") -> int:
    """Steps that the optimizer has applied; 0 before its state exists."""
    for state in engine.module.basic_optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def create_moments(engine: "Engine", num_steps: int) -> None:
    """Make zero moments as if ``num_steps`` steps had been applied, so that `set_full` can fill them."""
    base: Any = engine.module.basic_optimizer
    own = getattr(base, "moments_of", lambda master: MOMENTS)
    for master in _masters(engine):
        base.state[master] = {key: torch.zeros_like(master) for key in own(master)}
        if (
            "exp_avg_sq" in base.state[master]
        ):  # Adam counts its steps; a count that nobody raises would be read as the run's
            base.state[master]["step"] = torch.tensor(float(num_steps), dtype=torch.float32, device=master.device)
    link_moments(engine)


def link_moments(engine: "Engine") -> None:
    """Tell every parameter where its moments are; to be called before `full_moment` and `set_full`.

    DeepSpeed 0.19.8 does it once, after stepping the first of several optimizer groups, when the others have none yet.
    """
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def set_full(engine: "Engine", parameter: Any, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Write a whole fp32 weight and its moments into this rank's pieces, and the compute weight with them."""
    if not parameter.requires_grad:
        _set_frozen(parameter, weight)
        return
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        _set_partition(parameter, weight, None)
        for key, moment in moments.items():
            _set_partition(parameter, moment, key)
        return
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        parameter.set_full_hp_param(weight)
        for key, moment in moments.items():
            parameter.set_full_hp_param(moment, key)
    else:
        master = _master(engine, parameter)
        master.data.copy_(weight)
        for key, moment in moments.items():
            engine.module.basic_optimizer.state[master][key].copy_(moment)
    parameter.data.copy_(weight)


def computes_with(parameter: Any, weight: Tensor) -> bool:
    """Whether the model's own copy on this rank, or its piece of it, is the whole fp32 weight rounded to its dtype."""
    mine, rounded = parameter.detach(), weight.to(parameter.dtype)
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        piece = parameter.ds_tensor
        if piece.numel() != piece.ds_numel:  # on a disk
            return True
        start = piece.ds_numel * parameter.ds_zero_partition_rank
        rounded = rounded.flatten()[start : start + piece.ds_numel]
        mine = piece.detach()[: rounded.numel()].to(rounded.device)
    # The second for what is no number: to save that is the caller's decision.
    return torch.equal(mine, rounded) or torch.allclose(mine, rounded, rtol=0.0, atol=0.0, equal_nan=True)


def _frozen_weight(parameter: nn.Parameter) -> Tensor:
    """ZeRO 3 holds it in pieces too, and its optimizer knows nothing of it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def _set_frozen(parameter: Any, weight: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        parameter.ds_tensor.data.copy_(_piece(parameter, weight))
    else:
        parameter.data.copy_(weight)


def _piece(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's piece at ZeRO 3, padded where the parameter does not divide evenly."""
    piece_numel, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    flat = whole.flatten()
    piece = flat.new_zeros(piece_numel)
    mine = flat[rank * piece_numel : (rank + 1) * piece_numel]
    piece[: mine.numel()] = mine
    return piece


def _set_partition(parameter: Any, whole: Tensor, key: str | None) -> None:
    """DeepSpeed's own setter overruns the end where the parameter does not divide evenly."""
    piece = _piece(parameter, whole)
    parameter._z3_optimizer.set_local_hp_param(piece, parameter, key)
    if key is None:
        parameter.ds_tensor.data.copy_(piece)


def _masters(engine: "Engine") -> list[Tensor]:
    """The tensors that the base optimizer steps."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3 empties the optimizer's own list between steps
        return list(optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.module.basic_optimizer.param_groups for p in group["params"]]


def _master(engine: "Engine", parameter: nn.Parameter) -> Tensor:
    """The fp32 tensor behind a parameter that is not partitioned (ZeRO 0)."""
    optimizer = engine.optimizer
    for low, full in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True):
        for compute, master in zip(low, full, strict=True):
            if compute is parameter:
                return master
    return parameter
