"""What a carving is told."""

from dataclasses import dataclass
from typing import Literal

from moe.convert.carve.types import CarveShape

GATES = ("own", "ridge")


@dataclass(frozen=True, kw_only=True)
class CarveOptions:
    """Options of all methods.

    Attributes:
        shape: how many experts.
        method: a key of `CARVERS`.
        gate: "own" is the method's, "ridge" a linear gate fitted to the method's experts, which stock architectures can have.
        refit: fit the down-projection to what the gate chooses; some methods do so in a way of their own.
        sequential: a layer sees the text as the carved layers below left it, as in CMoE's code; otherwise as the dense ones do.
        bf16: compute the dense layers' matrix products in bf16 during calibration.
        seed: of everything random.
    """

    shape: CarveShape
    method: str
    gate: Literal["own", "ridge"] = "own"
    refit: bool = True
    sequential: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"--gate {self.gate!r} is unknown; use {' or '.join(GATES)}")
