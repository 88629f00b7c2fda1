"""Loading into an engine of any layout, and the proof that everything arrived in its place."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.files import CheckpointError, read_state
from moe.parallel.checkpoint.layout import Holding, first_error, holdings
from moe.parallel.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    from moe.parallel.engine import Engine


def load(path: Path, engine: "Engine") -> dict[str, Any]:
    """Put weights, moments, buffers and this rank's random state into a fresh engine; returns the trainer's state. Collective.

    Everything is then read back from the engine, the way a save would, and compared with the checksums that the ranks
    that wrote it left, expert by expert.

    Raises:
        CheckpointError: the checkpoint is of another model, or what is in place afterwards is not what was saved; the
            first name is given. On all ranks alike.
    """
    from moe.parallel.state import create_moments, moments_of, set_full

    reader, state = CheckpointReader(path), read_state(path)
    held = holdings(engine)
    _check_names(reader, held, engine.ep_size)
    with_moments = state["optimizer_steps"] > 0
    kinds: dict[str, tuple[str, ...]] = {
        holding.name: moments_of(engine, holding.parameter) if with_moments else () for holding in held
    }
    _check_moments(reader, kinds)
    if with_moments:
        create_moments(engine, state["optimizer_steps"])
    for holding in held:
        weight, *moments = (_read(reader, kind, holding) for kind in ("weight", *kinds[holding.name]))
        set_full(engine, holding.parameter, weight, dict(zip(kinds[holding.name], moments, strict=True)))
    buffers = dict(engine.model.named_buffers())
    for name in reader.names("buffer"):
        buffers[name].copy_(reader.tensor("buffer", name))
    if problem := first_error(_problem_in_place(reader, engine, held, kinds)):
        raise CheckpointError(problem)
    if state["world_size"] == dist.get_world_size():
        reader.restore_random_states(dist.get_rank())
    return state


def _read(reader: CheckpointReader, kind: str, holding: Holding) -> Tensor:
    if holding.first_expert is None:
        return reader.tensor(kind, holding.name)
    return reader.tensor(kind, holding.name, holding.first_expert, holding.first_expert + holding.shape[0])


def _problem_in_place(
    reader: CheckpointReader, engine: "Engine", held: list[Holding], kinds: dict[str, tuple[str, ...]]
) -> str | None:
    """What in this rank's engine is not what the checkpoint's writers had. Collective to its end."""
    from moe.parallel.state import computes_with, full_moment, full_weight

    problems = []
    for holding in held:
        weight = full_weight(engine, holding.parameter)
        problems.append(_difference(reader, "weight", holding, weight))
        if not computes_with(holding.parameter, weight):
            problems.append(f"rank {dist.get_rank()} does not compute with the loaded weight of {holding.name}")
        for kind in kinds[holding.name]:
            problems.append(_difference(reader, kind, holding, full_moment(engine, holding.parameter, kind)))
    buffers = dict(engine.model.named_buffers())
    for name in reader.names("buffer"):
        expected = reader.checksums("buffer", name)[0]
        if checksums(buffers[name], is_expert=False) != [expected.value]:
            problems.append(f"buffer {name}: not what {expected.file} of {reader.path} says")
    return next((problem for problem in problems if problem is not None), None)


def _difference(reader: CheckpointReader, kind: str, holding: Holding, tensor: Tensor) -> str | None:
    expected = reader.checksums(kind, holding.name)
    first = holding.first_expert or 0
    for index, value in enumerate(checksums(tensor, holding.is_expert), start=first):
        if value != expected[index].value:
            which = f"expert {index} of {holding.name}" if holding.is_expert else holding.name
            return (
                f"{kind} of {which} on rank {dist.get_rank()} has the checksum {value} after loading, and "
                f"{expected[index].value} according to {expected[index].file} of {reader.path}: the file was changed, or "
                "the values of another expert or parameter are in its place"
            )
    return None


def _check_moments(reader: CheckpointReader, kinds: dict[str, tuple[str, ...]]) -> None:
    """Frozen parameters have none, on either side; they are no other optimizer's."""
    from moe.parallel.state import MOMENTS

    stored = {kind: set(reader.names(kind)) for kind in MOMENTS}
    for name, wanted in kinds.items():
        found = tuple(kind for kind in MOMENTS if name in stored[kind])
        if wanted and found and found != wanted:
            raise CheckpointError(
                f"{reader.path} was written by another optimizer: of {name} it has {' and '.join(found)}, and this one "
                f"has {' and '.join(wanted)}; resume with the optim.name that wrote it, or start a new run folder"
            )


def _check_names(reader: CheckpointReader, held: list[Holding], ep_size: int) -> None:
    expected = {holding.name: holding.whole_shape(ep_size) for holding in held}
    found = {name: reader.shape("weight", name) for name in reader.names("weight")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{reader.path} is a checkpoint of another model: {name} is {found.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} here; resume with the config that wrote it, or start a new run folder"
            )
