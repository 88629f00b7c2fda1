"""What the trainers leave behind in the process is taken away."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the mixed precision and the device of the process's first `Accelerator`."""
    _forget()
    yield
    _forget()
