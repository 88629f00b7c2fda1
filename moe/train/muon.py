"""Muon for hidden matrices and AdamW for the rest, as one optimizer: what an engine takes.

Muon (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by its averaged gradient with all
singular values brought near 1. The step is torch's own, `torch.optim.Muon`, which takes matrices only: stacked experts are
given to it as one matrix each, so an expert moves as it would alone, whichever rank holds it. "match_rms_adamw" makes an
update about as large as one of AdamW (Moonlight, arXiv 2502.16982): one learning rate serves both.

It needs whole matrices. DeepSpeed keeps them at ZeRO 0 only; from stage 1 on the optimizer steps flat pieces.

Shapes: E experts, H x D a matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ADJUST_LR = "match_rms_adamw"
_ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
_MUON_MOMENTS = ("exp_avg",)


class MuonAdamW(torch.optim.AdamW):
    """AdamW that steps the groups with ``"muon": True`` by `torch.optim.Muon`.

    The state of such a parameter is ``exp_avg``, Muon's momentum buffer (E, H, D) or (H, D): an exponential average too.

    Args:
        params: groups; parameters of Muon's are matrices or stacks of them.
        momentum: of Muon, with Nesterov's correction.
        options: of `torch.optim.AdamW`.

    Raises:
        ValueError: a parameter of Muon's is neither a matrix nor a stack.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, **options)
        self._momentum = momentum
        for group in self._muon_groups():
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon steps matrices and stacks of them, not shapes such as {tuple(parameter.shape)}"
                    )

    def _muon_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get("muon", False)]

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the states of the parameter's shape."""
        muon = any(parameter is each for group in self._muon_groups() for each in group["params"])
        return _MUON_MOMENTS if muon else _ADAMW_MOMENTS

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; a parameter without a gradient stays."""
        every, muon = self.param_groups, self._muon_groups()
        self.param_groups = [group for group in every if not group.get("muon", False)]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in muon:
            self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        matrices: list[Tensor] = []
        buffers: list[Tensor] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            for weight_HD, gradient_HD, buffer_HD in zip(
                *map(_matrices, (parameter.detach(), parameter.grad, state["exp_avg"])), strict=True
            ):
                weight_HD.grad = gradient_HD
                matrices.append(weight_HD)
                buffers.append(buffer_HD)
        if not matrices:
            return
        # Made anew: an engine may have moved the parameters, and views of where they were would be stepped in vain.
        muon = torch.optim.Muon(
            matrices,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=self._momentum,
            adjust_lr_fn=ADJUST_LR,
        )
        for matrix, buffer in zip(matrices, buffers, strict=True):
            muon.state[matrix]["momentum_buffer"] = buffer
        muon.step()


def _matrices(tensor: Tensor) -> list[Tensor]:
    """Views of a stack's matrices, or the matrix itself."""
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]
