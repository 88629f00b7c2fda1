"""Training checkpoints: safetensors, whole parameters by name, atomic, with checksums.

The layout does not depend on how the run was spread: every parameter and moment is stored whole in fp32 (experts as one
slice of rows per expert-parallel rank), each by one of the ranks that hold it. Any world size, expert-parallel degree and
ZeRO stage can read it, and `export_model` needs no process group at all. DeepSpeed's own files are pickles whose layout
is the run's, so they are not used.

    step-00000040/
        rank-0000.safetensors   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; NAME@FIRST for the experts from FIRST on;
                                buffer/NAME; rng, rng_cuda
        state.json              step, data position, model config, fingerprints
        manifest.json           size and sha256 of every other file; written last

A folder without a valid manifest is no checkpoint: it is written under another name and renamed once complete and synced.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe.layer import moe_layers
from moe.parallel.engine import Engine, is_expert_parameter
from moe.parallel.state import (
    MOMENTS,
    create_moments,
    full_moment,
    full_weight,
    link_moments,
    num_optimizer_steps,
    set_full,
)

MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or trusted; the message says which file and why."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What `save` did: ``error`` is None, or why the checkpoint was given up (the same on all ranks)."""

    path: Path
    error: str | None


def step_dir(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete-looking checkpoints under ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / MANIFEST).is_file())


def save(root: Path, step: int, engine: Engine, state: dict[str, Any], keep_last: int) -> Saved:
    """Write a checkpoint, then delete all but the newest ``keep_last``. Collective.

    A failure to write (disk full, say) on any rank leaves the older checkpoints as they are and is returned, not raised,
    so that all ranks stay in step.

    Args:
        root: folder of the run's checkpoints, shared by all ranks.
        step: optimizer steps done.
        engine: what to save.
        state: plain data from every rank's trainer that is the same on all of them.
        keep_last: how many checkpoints stay, this one included.
    """
    final, partial = step_dir(root, step), root / f".partial-step-{step:08d}"
    if dist.get_rank() == 0:  # files of ranks that a killed run had and this one has not must not get in
        for left in root.glob(".partial-step-*"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    tensors = _gather_owned(engine)
    tensors |= _random_states()
    state = {**state, "step": step, "optimizer_steps": num_optimizer_steps(engine), "world_size": dist.get_world_size()}
    error = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write_tensors(partial / f"rank-{dist.get_rank():04d}.safetensors", tensors)
        if dist.get_rank() == 0:
            _write_text(partial / STATE, json.dumps(state, indent=1))
    except (OSError, SafetensorError) as problem:
        error = f"rank {dist.get_rank()}: {problem}"
    error = _any_error(error)
    if error is None:
        try:
            if dist.get_rank() == 0:
                _commit(partial, final)
        except OSError as problem:
            error = f"rank 0: {problem}"
        error = _any_error(error)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        if error is None:
            found = list_checkpoints(root)
            place = found.index(final) + 1
            # Newer ones are damaged, or the run would have gone on from them; kept, they would push good ones out.
            for stale in found[place:] + found[: max(place - keep_last, 0)]:
                shutil.rmtree(stale, ignore_errors=True)
    dist.barrier()
    return Saved(path=final, error=error)


def _random_states() -> dict[str, Tensor]:
    """Of the router noise and everything else that this rank draws."""
    states = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["rng_cuda"] = torch.cuda.get_rng_state()
    return states


def _any_error(error: str | None) -> str | None:
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((found for found in errors if found is not None), None)


def _gather_owned(engine: Engine) -> dict[str, Tensor]:
    """This rank's share of all weights, moments and buffers. Parameters are put together one at a time."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with_moments = num_optimizer_steps(engine) > 0
    if with_moments:
        link_moments(engine)
    owned: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(engine.named_parameters()):
        if is_expert_parameter(parameter):
            ep_rank = rank % engine.ep_size
            owner = index % (world_size // engine.ep_size) * engine.ep_size + ep_rank
            name = f"{name}@{ep_rank * _whole_shape(parameter)[0]}"
        else:
            owner = index % world_size
        weight = full_weight(engine, parameter)
        if owner == rank:
            owned[f"weight/{name}"] = _own_copy(weight)
        for key in MOMENTS if with_moments and parameter.requires_grad else ():
            moment = full_moment(engine, parameter, key)
            if owner == rank:
                owned[f"{key}/{name}"] = _own_copy(moment)
    if rank == 0:
        persistent = engine.model.state_dict(keep_vars=True)
        for name, buffer in engine.model.named_buffers():
            if name in persistent:
                owned[f"buffer/{name}"] = _own_copy(buffer)
    return owned


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    _sync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(partial: Path, final: Path) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    _write_text(partial / MANIFEST, json.dumps(files, indent=1))
    _sync(partial)
    if final.exists():  # the same step saved again, after a resume from an older checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed; it is named.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as problem:  # absent, garbled, or of another kind
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {problem}") from problem
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is truncated: {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file} is corrupted: its sha256 is not the one in {MANIFEST}")


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `verify`, and what was wrong with newer ones."""
    problems = []
    for path in reversed(list_checkpoints(root)):
        try:
            verify(path)
        except CheckpointError as problem:
            problems.append(str(problem))
        else:
            return path, problems
    return None, problems


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


class CheckpointReader:
    """Whole tensors of a checkpoint by name, read from the files of whatever ranks wrote them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [safe_open(file, framework="pt") for file in sorted(path.glob("rank-*.safetensors"))]
        self._slices: dict[str, list[tuple[int, int, str]]] = {}
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                name, _, first = key.partition("@")
                self._slices.setdefault(name, []).append((int(first or 0), index, key))
        for pieces in self._slices.values():
            pieces.sort()

    def names(self, kind: str) -> list[str]:
        """Names stored under "weight", "exp_avg", "exp_avg_sq" or "buffer"."""
        return [name.partition("/")[2] for name in self._slices if name.startswith(f"{kind}/")]

    def shape(self, kind: str, name: str) -> list[int]:
        """Shape of the whole tensor."""
        pieces = [self._files[index].get_slice(key).get_shape() for _, index, key in self._slices[f"{kind}/{name}"]]
        return [sum(piece[0] for piece in pieces), *pieces[0][1:]] if pieces[0] else pieces[0]

    def tensor(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The whole tensor, or its rows from ``start`` to ``stop``; only pieces that overlap them are read."""
        pieces = self._slices[f"{kind}/{name}"]
        if len(pieces) == 1 and stop is None:
            return self._files[pieces[0][1]].get_tensor(pieces[0][2])
        stop = self.shape(kind, name)[0] if stop is None else stop
        rows = []
        for first, index, key in pieces:
            piece = self._files[index].get_slice(key)
            low, high = max(start - first, 0), min(stop - first, piece.get_shape()[0])
            if low < high:
                rows.append(piece[low:high])
        return torch.cat(rows)

    def restore_random_states(self, rank: int) -> None:
        """Set this process's random states to those of ``rank`` when the checkpoint was written."""
        file = self._files[rank]
        torch.set_rng_state(file.get_tensor("rng"))
        if "rng_cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Put weights, moments, buffers and this rank's random state into a fresh engine; returns the trainer's state. Collective.

    Raises:
        CheckpointError: the checkpoint is of another model; the first name or shape that differs is named.
    """
    reader, state = CheckpointReader(path), read_state(path)
    _check_names(reader, engine)
    with_moments = state["optimizer_steps"] > 0
    if with_moments:
        create_moments(engine, state["optimizer_steps"])
    for name, parameter in engine.named_parameters():
        start, stop = 0, None
        if is_expert_parameter(parameter):
            num_local = _whole_shape(parameter)[0]
            start = dist.get_rank() % engine.ep_size * num_local
            stop = start + num_local
        moments = {}
        if with_moments and parameter.requires_grad:
            moments = {key: reader.tensor(key, name, start, stop) for key in MOMENTS}
        set_full(engine, parameter, reader.tensor("weight", name, start, stop), moments)
    buffers = dict(engine.model.named_buffers())
    for name in reader.names("buffer"):
        buffers[name].copy_(reader.tensor("buffer", name))
    if state["world_size"] == dist.get_world_size():
        reader.restore_random_states(dist.get_rank())
    return state


def _check_names(reader: CheckpointReader, engine: Engine) -> None:
    expected = {}
    for name, parameter in engine.named_parameters():
        shape = list(_whole_shape(parameter))
        if is_expert_parameter(parameter):
            shape[0] *= engine.ep_size
        expected[name] = shape
    found = {name: reader.shape("weight", name) for name in reader.names("weight")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{reader.path} is a checkpoint of another model: {name} is {found.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} here; resume with the config that wrote it, or start a new run folder"
            )


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the weights and buffers of a checkpoint into a whole model; no process group needed."""
    reader = CheckpointReader(path)
    state_dict = {name: reader.tensor("weight", name) for name in reader.names("weight")}
    state_dict |= {name: reader.tensor("buffer", name) for name in reader.names("buffer")}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if unexpected or set(missing) - tied:
        raise CheckpointError(f"{path} does not fit the model: missing {missing}, unexpected {unexpected}")
    assert all(layer.exchange is None for layer in moe_layers(model).values())
