"""Schedules over optimizer steps: temperatures that fall, regularisers that grow, phases that end.

The step is a buffer of the router, so it is saved with the weights and a resumed run goes on where it stopped.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe.routers.base import Router, RouterConfig, StepLoad

Shape = Literal["linear", "exponential"]
SHAPES = ("linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig(RouterConfig):
    """Options of a temperature that goes from one value to another over optimizer steps.

    Attributes:
        temperature_start: at step 0.
        temperature_end: from ``temperature_steps`` on.
        temperature_steps: 0 is a constant temperature.
        temperature_shape: "linear" in the temperature or "exponential", linear in its logarithm.
    """

    temperature_start: float = 1.0
    temperature_end: float = 1.0
    temperature_steps: int = 0
    temperature_shape: Shape = "exponential"

    def __post_init__(self) -> None:
        for name in ("temperature_start", "temperature_end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"router.{name}={getattr(self, name)} must be positive")
        if self.temperature_steps < 0:
            raise ValueError(f"router.temperature_steps={self.temperature_steps} must not be negative; 0 is constant")
        if self.temperature_steps == 0 and self.temperature_start != self.temperature_end:
            raise ValueError(
                f"router.temperature_start={self.temperature_start} is never used with router.temperature_steps=0; set "
                f"the steps, or router.temperature_start={self.temperature_end}"
            )
        if self.temperature_shape not in SHAPES:
            raise ValueError(f"router.temperature_shape={self.temperature_shape!r} is unknown; use one of {SHAPES}")

    def temperature(self, step: Tensor) -> Tensor:
        """() fp32, positive, on the device of ``step``, a () int64."""
        return anneal(
            self.temperature_start, self.temperature_end, self.temperature_steps, step, self.temperature_shape
        )


class ScheduledRouter(Router):
    """A router that counts the optimizer steps it has been through.

    Attributes:
        steps: () int64 buffer.
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self, std: float) -> None:
        """Start counting anew; subclasses call this and initialise their own."""
        nn.init.zeros_(self.get_buffer("steps"))  # nn.init, since loading a model turns that off for what it loaded

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
    if shape == "exponential" and min(start, end) <= 0:
        raise ValueError(f"an exponential schedule needs positive values, not {start} and {end}; use shape 'linear'")
    done = (step.float() / num_steps).clamp(max=1.0) if num_steps else torch.ones_like(step, dtype=torch.float32)
    if shape == "linear":
        return start * (1 - done) + end * done  # exactly `end` at the end
    return start ** (1 - done) * end**done
