"""Saving: a training step waits for a copy to host memory; a thread on each rank writes it while training goes on.

The threads do not talk to each other through the process group: a collective of theirs could meet one of the training
step and both would hang. They agree through the folder, which all ranks must see anyway. Each rank's thread writes its
tensors and then a small record (size, hash, checksums, or why it failed); the thread of rank 0 waits for the records of
all, checks that they make a whole model, writes the manifest and renames the folder. So a rank that has written its
record may die, and the checkpoint still becomes complete. All ranks learn how it ended in `Saver.collect`.

At most one save is under way, hence one snapshot in memory.
"""

import json
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from moe.parallel.checkpoint.checksums import checksums
from moe.parallel.checkpoint.files import (
    STATE,
    CheckpointError,
    FileRecord,
    list_checkpoints,
    partial_dir,
    rank_file,
    step_dir,
    sync,
    write_bytes,
    write_manifest,
)
from moe.parallel.checkpoint.layout import first_error
from moe.parallel.checkpoint.reader import CHECKSUMS
from moe.parallel.checkpoint.records import RankRecord, drifted, missing_slices, read_record, write_record
from moe.parallel.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot
from moe.parallel.checkpoint.tensor_file import write_tensors

if TYPE_CHECKING:
    from moe.parallel.engine import Engine

_POLL_SECONDS = (0.01, 0.5)  # between looks at the folder: at first, and at most
_ABANDON_SECONDS = 30.0  # for the other ranks' records, once training has failed


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What became of a save, the same on all ranks.

    Attributes:
        step: optimizer steps done.
        path: of the checkpoint.
        error: None, or why it was given up.
        warnings: parameters whose copies on different ranks are no longer equal.
    """

    step: int
    path: Path
    error: str | None
    warnings: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Job:
    """A save under way.

    Attributes:
        token: tells its records from those of an earlier attempt.
        deadline: when rank 0 stops waiting for records (monotonic seconds).
    """

    step: int
    state: bytes
    attachments: dict[str, bytes]
    snapshot: Snapshot
    token: str
    deadline: float
    error: str | None = None
    warnings: list[str] = field(default_factory=list)
    own_file_done: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Saves the checkpoints of one run; the same calls on all ranks.

    Args:
        root: folder of the run's checkpoints, shared by all ranks.
        engine: what to save.
        keep_last: how many checkpoints stay, the new one included.
        timeout_seconds: how long rank 0 waits for the other ranks' files, counted from `begin`.
        attachments: small files by name to add to every checkpoint; rank 0's count.
    """

    def __init__(
        self,
        root: Path,
        engine: "Engine",
        keep_last: int,
        timeout_seconds: float = 600.0,
        attachments: dict[str, bytes] | None = None,
    ) -> None:
        self._root, self._engine, self._keep_last, self._timeout = root, engine, keep_last, timeout_seconds
        self._attachments = attachments or {}
        self._memory = HostMemory()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether a save was begun and not collected; the same on all ranks."""
        return self._job is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still works on it; `collect` does not have to wait once no rank is busy."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy the training state and start writing it. Collective; returns once the copy is complete.

        Args:
            step: optimizer steps done.
            state: plain data from every rank's trainer that is the same on all of them.
        """
        assert self._job is None, "collect the save under way first"
        if dist.get_rank() == 0:  # files of ranks that a killed run had and this one has not must not get in
            for left in self._root.glob(".partial-step-*"):
                shutil.rmtree(left, ignore_errors=True)
        tokens: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(tokens, uuid.uuid4().hex)  # also: nobody writes before rank 0 has cleaned up
        error, snapshot = None, None
        try:
            snapshot = take_snapshot(self._engine, self._memory)
        except CheckpointError as problem:
            error = str(problem)
            snapshot = Snapshot(tensors={}, experts=set(), replicas={}, whole={}, num_steps=0)
        text = json.dumps(
            {**state, "step": step, "optimizer_steps": snapshot.num_steps, "world_size": dist.get_world_size()},
            indent=1,
        )
        self._job = _Job(
            step=step,
            state=text.encode(),
            attachments=self._attachments,
            snapshot=snapshot,
            token=tokens[0],
            deadline=time.monotonic() + self._timeout,
            error=error,
        )
        self._thread = threading.Thread(target=self._write, args=(self._job,), name="checkpoint", daemon=True)
        self._thread.start()

    def collect(self) -> Saved:
        """Wait until the save under way is complete or given up, and learn which. Collective."""
        job, thread = self._job, self._thread
        assert job is not None and thread is not None, "nothing was begun"
        job.own_file_done.wait()
        if first_error(job.error) is not None:  # rank 0 need not look for a record that could not be written
            job.deadline = 0.0
        thread.join()
        outcome: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcome, (job.error, job.warnings))
        errors = [error for error, _ in outcome if error is not None]
        self._job = self._thread = None
        return Saved(
            step=job.step,
            path=step_dir(self._root, job.step),
            # Rank 0's last: it may only say that it did not hear of another one.
            error=next((error for error, _ in outcome[1:] if error is not None), errors[0] if errors else None),
            warnings=outcome[0][1],
        )

    def abandon(self) -> None:
        """After an error in training: let this rank's part of a save under way end, without the other ranks' help."""
        job, thread = self._job, self._thread
        if job is not None and thread is not None:
            job.deadline = min(job.deadline, time.monotonic() + _ABANDON_SECONDS)
            thread.join()

    def release(self) -> None:
        """Give the host memory back; the next save takes new one."""
        assert self._job is None
        self._memory = HostMemory()

    def _write(self, job: _Job) -> None:
        """The thread: this rank's file, and on rank 0 all that makes a checkpoint of the files."""
        rank, folder = dist.get_rank(), partial_dir(self._root, job.step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if job.error is not None:
                raise CheckpointError(job.error)
            self._write_own(folder, rank, job)
        except Exception as problem:  # whatever it is, the run must hear of it and go on
            job.error = job.error or f"rank {rank}: {problem}"
            with suppress(OSError):  # rank 0 hears of it in `collect` at the latest
                rank_file(folder, rank).unlink(missing_ok=True)  # makes room for the record on a full disk
                write_record(folder, rank, RankRecord(token=job.token, error=job.error))
        finally:
            job.own_file_done.set()
        if rank == 0:
            self._commit_or_clear(folder, job)

    def _write_own(self, folder: Path, rank: int, job: _Job) -> None:
        shot = job.snapshot
        sums = {key: checksums(shot.tensors[key], key in shot.experts) for key in shot.tensors if "/" in key}
        file = write_tensors(rank_file(folder, rank), shot.tensors, {"format": "pt", CHECKSUMS: json.dumps(sums)})
        write_record(folder, rank, RankRecord(token=job.token, file=file, checksums=sums, replicas=shot.replicas))

    def _commit_or_clear(self, folder: Path, job: _Job) -> None:
        try:
            records = self._wait_for_records(folder, job)
            job.warnings = drifted(records)
            self._commit(folder, job, records)
        except Exception as problem:  # as above
            job.error = job.error or (str(problem) if isinstance(problem, CheckpointError) else f"rank 0: {problem}")
            shutil.rmtree(folder, ignore_errors=True)
            return
        found = list_checkpoints(self._root)
        place = found.index(step_dir(self._root, job.step)) + 1
        # Newer ones are damaged, or the run would have gone on from them; kept, they would push good ones out.
        for stale in found[place:] + found[: max(place - self._keep_last, 0)]:
            shutil.rmtree(stale, ignore_errors=True)

    @staticmethod
    def _wait_for_records(folder: Path, job: _Job) -> list[RankRecord]:
        """The records of all ranks, each of them after the last write of its rank.

        Raises:
            CheckpointError: a rank failed, or its record did not come in time.
        """
        world_size, pause = dist.get_world_size(), _POLL_SECONDS[0]
        found: dict[int, RankRecord] = {}
        while True:
            for rank in range(world_size):
                if rank not in found and (record := read_record(folder, rank, job.token)) is not None:
                    found[rank] = record
            late = sorted(set(range(world_size)) - found.keys())
            if not late or time.monotonic() > job.deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
        for record in found.values():
            if record.error is not None:
                raise CheckpointError(record.error)
        if late:
            raise CheckpointError(
                f"rank 0 did not see the files of ranks {late} in time: they failed, are slow, or write to another disk; "
                f"{folder.parent} must be on a file system that all ranks share"
            )
        return [found[rank] for rank in range(world_size)]

    def _commit(self, folder: Path, job: _Job, records: list[RankRecord]) -> None:
        files: dict[str, FileRecord] = {}
        for rank, record in enumerate(records):
            path = rank_file(folder, rank)
            assert record.file is not None
            if path.stat().st_size != record.file.size:
                raise CheckpointError(f"rank {rank} wrote {record.file.size} bytes, rank 0 sees {path.stat().st_size}")
            files[path.name] = record.file
        if problem := missing_slices(records, job.snapshot.whole):
            raise CheckpointError(problem)
        for name, content in {**job.attachments, STATE: job.state}.items():
            files[name] = write_bytes(folder / name, content)
        for path in folder.iterdir():
            if path.name not in files:
                os.remove(path)  # the records
        write_manifest(folder, files)
        final = step_dir(self._root, job.step)
        if final.exists():  # the same step saved again, after a resume from an older checkpoint
            shutil.rmtree(final)
        folder.rename(final)
        sync(final.parent)


def save(
    root: Path, step: int, engine: "Engine", state: dict[str, Any], keep_last: int, timeout_seconds: float = 600.0
) -> Saved:
    """Write a checkpoint and wait for it, then delete all but the newest ``keep_last``. Collective.

    A failure to write (disk full, say) on any rank leaves the older checkpoints as they are and is returned, not raised,
    so that all ranks stay in step. Arguments as for `Saver`.
    """
    saver = Saver(root, engine, keep_last, timeout_seconds)
    saver.begin(step, state)
    return saver.collect()
