"""How tokens travel to their experts: the section ``parallel.exchange`` of a run's config."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """Options of the expert-parallel exchange.

    Attributes:
        dedup: send a token once to each rank that holds some of its experts, and one sum back; False sends one row per
            assignment and applies the weights after the return (the usual way, here to compare with).
        overlap_chunks: parts that a batch is sent in; experts compute on one while others travel.
        hierarchical: ranks per node of the two-stage exchange, in which a token crosses to another node once; "off"
            sends straight to each rank; "auto" is two-stage where the expert group spans nodes (LOCAL_WORLD_SIZE).
        payload: dtype of rows on the wire: "model" (as they are), "bf16", or "fp8" (e4m3 with one fp32 scale per row).
            Sums are fp32 in any case. Only "model" is exact.
        backend: "torch" (`torch.distributed`) or "deepep" (`moe.parallel.exchange.deepep`; never run by this project, so
            never chosen by itself), which takes none of the other options.
    """

    __pydantic_config__ = {"extra": "forbid"}  # read by pydantic; unannotated, so it is no field

    dedup: bool = True
    overlap_chunks: int = 1
    hierarchical: int | Literal["auto", "off"] = "auto"
    payload: Literal["model", "bf16", "fp8"] = "model"
    backend: Literal["torch", "deepep"] = "torch"

    def __post_init__(self) -> None:
        if self.hierarchical == 0:  # a bare `off` in YAML is False
            object.__setattr__(self, "hierarchical", "off")
        if self.overlap_chunks < 1:
            raise ValueError(f"parallel.exchange.overlap_chunks={self.overlap_chunks} must be at least 1")
        if self.hierarchical not in ("auto", "off") and (
            not isinstance(self.hierarchical, int) or self.hierarchical is True or self.hierarchical < 1
        ):
            raise ValueError(
                f"parallel.exchange.hierarchical={self.hierarchical!r} must be 'auto', 'off' or the ranks per node"
            )
        for name, known in (("payload", ("model", "bf16", "fp8")), ("backend", ("torch", "deepep"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"parallel.exchange.{name}={getattr(self, name)!r} is unknown; use one of {list(known)}"
                )
        if not self.dedup and self.hierarchical not in ("auto", "off"):
            raise ValueError(
                f"parallel.exchange.hierarchical={self.hierarchical} needs parallel.exchange.dedup=true: the second "
                "stage starts from one row per token and node"
            )
        for name in ("dedup", "overlap_chunks", "hierarchical", "payload"):
            if self.backend == "deepep" and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"parallel.exchange.{name}={getattr(self, name)} does not go with backend='deepep', which decides that "
                    "by itself; leave it out, or set parallel.exchange.backend=torch"
                )
