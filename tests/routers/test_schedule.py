"""Schedules over optimizer steps, and the router that counts them."""

from pathlib import Path

import pytest
import torch
from helpers.fitting import one_model_step
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from models.tiny import layers_of

from moe.models import MoEForCausalLM
from moe.routers.schedule import ScheduledRouter, TemperatureConfig, anneal


def value(start: float, end: float, num_steps: int, step: int, shape: str) -> float:
    got = anneal(start, end, num_steps, torch.tensor(step), shape)
    assert got.shape == ()
    assert got.dtype == torch.float32
    return got.item()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", {0: 4.0, 5: 3.25, 10: 2.5, 20: 1.0, 21: 1.0}), ("exponential", {0: 4.0, 5: 8**0.5, 10: 2.0, 20: 1.0})],
)
def test_values(shape: str, expected: dict[int, float]) -> None:
    for step, wanted in expected.items():
        assert value(4.0, 1.0, 20, step, shape) == pytest.approx(wanted, rel=1e-6)
    assert value(0.1, 0.7, 20, 10**9, shape) == torch.tensor(0.7).item(), "exactly the end"
    assert value(0.1, 0.7, 0, 0, shape) == torch.tensor(0.7).item(), "no steps: the end at once"


def test_growth_from_zero_needs_the_linear_shape() -> None:
    assert value(0.0, 0.5, 10, 0, "linear") == 0
    assert value(0.0, 0.5, 10, 5, "linear") == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"exponential schedule needs positive values, not 0.0 and 0.5"):
        value(0.0, 0.5, 10, 5, "exponential")
    with pytest.raises(ValueError, match=r"schedule shape 'cosine' is unknown"):
        value(1.0, 0.5, 10, 5, "cosine")


def test_temperature() -> None:
    config = TemperatureConfig(temperature_start=2.0, temperature_end=0.5, temperature_steps=10)
    assert [round(config.temperature(torch.tensor(s)).item(), 5) for s in (0, 5, 10, 11)] == [2.0, 1.0, 0.5, 0.5]
    assert TemperatureConfig().temperature(torch.tensor(7)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_end": 0.0}, r"router.temperature_end=0.0 must be positive"),
        ({"temperature_start": -1.0}, r"router.temperature_start=-1.0 must be positive"),
        ({"temperature_steps": -1}, r"router.temperature_steps=-1 must not be negative"),
        ({"temperature_start": 2.0}, r"router.temperature_start=2.0 is never used with router.temperature_steps=0"),
        ({"temperature_shape": "cosine"}, r"router.temperature_shape='cosine' is unknown; use one of"),
    ],
)
def test_bad_temperatures(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureConfig(**options)


def test_the_step_survives_saving_a_model(tmp_path: Path) -> None:
    model = one_model_step({"name": "gumbel"})
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    assert [layer.router.get_buffer("steps").item() for layer in layers_of(loaded)] == [1, 1]


def test_steps_are_counted_saved_and_reset() -> None:
    layer = make_layer(router={"name": "gumbel"})
    router = layer.router
    assert isinstance(router, ScheduledRouter)
    for applied in (True, False, True):
        for _ in range(2):  # micro-batches
            layer(torch.randn(5, 6, requires_grad=True)).sum().backward()
        layer.finish_step(applied=applied)
    assert router.steps == 2, "one per applied step"
    layer.eval()(torch.randn(5, 6))
    assert router.steps == 2

    other = make_router(6, 4, name="gumbel")
    other.load_state_dict(router.state_dict())
    assert other.get_buffer("steps") == 2
    assert other.to(torch.bfloat16).get_buffer("steps").dtype == torch.int64
    router.reset_parameters(0.1)
    assert router.steps == 0
