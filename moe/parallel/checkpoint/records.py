"""What the ranks' threads tell rank 0's in files beside their tensors, and what rank 0 concludes from all of them."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moe.parallel.checkpoint.files import FileRecord, write_bytes

_MOST_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """How a rank's part of a save ended.

    Attributes:
        token: of the attempt.
        file: its tensors' file; None after a failure.
        error: why it failed.
        checksums: of what it wrote, by key.
        replicas: of what it holds as well, by key.
    """

    token: str
    file: FileRecord | None = None
    error: str | None = None
    checksums: dict[str, list[str]] = field(default_factory=dict)
    replicas: dict[str, list[str]] = field(default_factory=dict)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"record-{rank:04d}.json"


def write_record(folder: Path, rank: int, record: RankRecord) -> None:
    """Leave the record for rank 0; it appears whole or not at all."""
    partial = _path(folder, rank).with_suffix(".partial")
    write_bytes(partial, json.dumps(asdict(record)).encode())
    os.replace(partial, _path(folder, rank))


def read_record(folder: Path, rank: int, token: str) -> RankRecord | None:
    """The record of a rank for this attempt, once it is there."""
    try:
        values = json.loads(_path(folder, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if values["token"] != token:
        return None
    file = values.pop("file")
    return RankRecord(file=None if file is None else FileRecord(**file), **values)


def missing_slices(records: list[RankRecord], whole: dict[str, int]) -> str | None:
    """What is wrong when the ranks' files together are not the whole model, each expert once.

    Args:
        records: by rank.
        whole: by name, how many checksums there must be.
    """
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in whole}
    for rank, record in enumerate(records):
        for key, sums in record.checksums.items():
            name, _, first = key.partition("@")
            found.setdefault(name, []).append((int(first or 0), len(sums), rank))
    for name, slices in found.items():
        end = 0
        for start, number, rank in sorted(slices):
            if start != end:
                return f"rank {rank} wrote {name} from {start} on where {end} should follow"
            end += number
        if end != whole.get(name, 0):
            return f"{name} has {end} parts in the files of all ranks, not {whole.get(name, 0)}"
    return None


def drifted(records: list[RankRecord]) -> list[str]:
    """One line for each parameter that is not the same on all ranks that hold it, up to a few."""
    written = {key: (sums, rank) for rank, record in enumerate(records) for key, sums in record.checksums.items()}
    ranks_of: dict[str, set[int]] = {}
    for rank, record in enumerate(records):
        for key, sums in record.replicas.items():
            expected, writer = written.get(key, (None, rank))
            if expected is None or sums == expected:
                continue
            name, at, first = key.partition("@")
            for index, (ours, theirs) in enumerate(zip(sums, expected, strict=True), start=int(first or 0)):
                if ours != theirs:
                    label = f"expert {index} of {name}" if at else name
                    ranks_of.setdefault(label, set()).update((rank, writer))
    lines = [f"{label} differs between ranks {sorted(ranks)}" for label, ranks in ranks_of.items()]
    more = len(lines) - _MOST_SHOWN
    return lines[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
