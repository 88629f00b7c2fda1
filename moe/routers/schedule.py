"""Schedules over optimizer steps: temperatures that fall, regularisers that grow, phases that end.

The step is a buffer of the router, so it is saved with the weights and a resumed run goes on where it stopped.
"""

from typing import Literal

import torch
from torch import Tensor

from moe.routers.base import Router, RouterConfig, StepLoad

Shape = Literal["linear", "exponential"]
SHAPES = ("linear", "exponential")


class ScheduledRouter(Router):
    """A router that counts the optimizer steps it has been through.

    Attributes:
        steps: () int64 buffer.
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def after_step(self, load: StepLoad) -> None:
        """Count the step."""
        self.get_buffer("steps").add_(1)


def anneal(start: float, end: float, num_steps: int, step: Tensor, shape: Shape = "exponential") -> Tensor:
    """Value at ``step``: ``start`` at 0, ``end`` from ``num_steps`` on; () fp32 on the device of ``step``.

    Args:
        start, end: positive where the shape is exponential.
        num_steps: 0 gives ``end`` at once.
        step: () int64.
        shape: "linear" in the value or, "exponential", in its logarithm.
    """
    if shape not in SHAPES:
        raise ValueError(f"schedule shape {shape!r} is unknown; use one of {SHAPES}")
    done = (
        (step.float() / max(num_steps, 1)).clamp(max=1.0) if num_steps else torch.ones_like(step, dtype=torch.float32)
    )
    if shape == "linear" or start == end:
        return start + (end - start) * done
    return start * (end / start) ** done
