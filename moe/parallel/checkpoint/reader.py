"""Reading a checkpoint: whole tensors, or some of their rows, from the files of whatever ranks wrote them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe.layer import moe_layers
from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.files import CheckpointError

CHECKSUMS = "checksums"  # in the header of a rank's file: {key: [one per expert]}


@dataclass(frozen=True, kw_only=True)
class Checksum:
    """Of one expert, or of a whole tensor, and the file that has it."""

    value: str
    file: str


class CheckpointReader:
    """Whole tensors of a checkpoint by name.

    Raises:
        CheckpointError: the slices of a tensor do not add up to the whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._paths = sorted(path.glob("rank-*.safetensors"))
        self._files = [safe_open(file, framework="pt") for file in self._paths]
        self._checksums = [json.loads((file.metadata() or {}).get(CHECKSUMS, "{}")) for file in self._files]
        self._slices: dict[str, list[tuple[int, int, str]]] = {}
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                name, _, first = key.partition("@")
                self._slices.setdefault(name, []).append((int(first or 0), index, key))
        for name, pieces in self._slices.items():
            pieces.sort()
            if not name.startswith("rng"):
                self._check_tiling(name)

    def _check_tiling(self, name: str) -> None:
        expected = 0
        for first, index, key in self._slices[name]:
            if first != expected:
                raise CheckpointError(
                    f"{self._paths[index]} has {name} from row {first} on, where row {expected} should follow: rows are "
                    "missing or stored twice"
                )
            shape = self._files[index].get_slice(key).get_shape()
            expected += shape[0] if shape else 1

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

    def checksums(self, kind: str, name: str) -> list[Checksum]:
        """What the ranks that wrote a tensor computed: one per expert, or one of the whole.

        Raises:
            CheckpointError: a file has none.
        """
        found = []
        for _, index, key in self._slices[f"{kind}/{name}"]:
            if key not in self._checksums[index]:
                raise CheckpointError(
                    f"{self._paths[index]} has no checksum of {key}: its header is not as it was written"
                )
            found += [Checksum(value=value, file=self._paths[index].name) for value in self._checksums[index][key]]
        return found

    def checked_tensor(self, kind: str, name: str) -> Tensor:
        """The whole tensor, after comparing it with its checksums.

        Raises:
            CheckpointError: an expert, or the tensor, is not what was saved under its name.
        """
        tensor, expected = self.tensor(kind, name), self.checksums(kind, name)
        is_expert = any("@" in key for _, _, key in self._slices[f"{kind}/{name}"])
        for index, value in enumerate(checksums(tensor, is_expert)):
            if value != expected[index].value:
                which = f"expert {index} of {name}" if is_expert else name
                raise CheckpointError(
                    f"{self.path / expected[index].file}: {kind} of {which} is not what was saved there"
                )
        return tensor

    def restore_random_states(self, rank: int) -> None:
        """Set this process's random states to those of ``rank`` when the checkpoint was written."""
        file = self._files[rank]
        torch.set_rng_state(file.get_tensor("rng"))
        if "rng_cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))


def verify_tensors(path: Path) -> int:
    """Compare every weight, moment and buffer with its checksums, as `verify` does with files; returns how many.

    Raises:
        CheckpointError: see `CheckpointReader.checked_tensor`.
    """
    reader = CheckpointReader(path)
    found = [(kind, name) for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer") for name in reader.names(kind)]
    for kind, name in found:
        reader.checked_tensor(kind, name)
    return len(found)


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
