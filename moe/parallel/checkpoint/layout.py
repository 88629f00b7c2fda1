"""What a rank holds of a model, by names that do not depend on the layout, and who of several holders writes it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from moe.layer import moe_layers

if TYPE_CHECKING:
    from moe.parallel.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A parameter as this rank holds it.

    Attributes:
        name: in the whole model.
        parameter: the engine's; at ZeRO 3 without its data.
        shape: as this rank holds it; of experts, only its own.
        first_expert: number of the first of its experts in the layer; None where rows are no experts.
        writer: the rank that writes it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    first_expert: int | None
    writer: int

    @property
    def is_expert(self) -> bool:
        """Whether rows are experts, of which other ranks may hold others."""
        return self.first_expert is not None

    @property
    def key(self) -> str:
        """Name in a rank's file."""
        return self.name if self.first_expert is None else f"{self.name}@{self.first_expert}"

    def whole_shape(self, ep_size: int) -> list[int]:
        """Shape over all ranks."""
        return [self.shape[0] * ep_size, *self.shape[1:]] if self.is_expert else list(self.shape)


def holdings(engine: "Engine") -> list[Holding]:
    """All parameters, in the same order on all ranks; each goes to the holder that has the least to write so far."""
    first_experts = _first_experts(engine)
    numel_of_rank = [0] * dist.get_world_size()
    found = []
    for name, parameter in engine.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        first = first_experts.get(name)
        num_slices = 1 if first is None else engine.ep_size
        writers = []
        for index in range(num_slices):  # rank r has the slice r % ep_size
            writers.append(min(range(index, len(numel_of_rank), num_slices), key=numel_of_rank.__getitem__))
            numel_of_rank[writers[-1]] += torch.Size(shape).numel()
        mine = 0 if first is None else first // shape[0]
        found.append(Holding(name=name, parameter=parameter, shape=shape, first_expert=first, writer=writers[mine]))
    return found


def _first_experts(engine: "Engine") -> dict[str, int]:
    """By name of the expert parameters: the number in its layer of the first expert that this rank was given."""
    found = {}
    for layer_name, layer in moe_layers(engine.model).items():
        for name, parameter in layer.experts.named_parameters():
            num_local = getattr(parameter, "ds_shape", parameter.shape)[0]
            found[f"{layer_name}.experts.{name}"] = getattr(layer, "ep_rank", 0) * num_local
    return found


def first_error(error: str | None) -> str | None:
    """The error of the first rank that has one, on all ranks. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((found for found in errors if found is not None), None)
