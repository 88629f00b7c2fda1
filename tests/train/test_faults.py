"""What goes wrong while training: signals, killed processes, full disks, spoilt checkpoints, losses that are no numbers.

Resumed runs are compared with one that nothing disturbed, to the last bit: `reference_run`, whose router draws noise, so
that a random state that is not restored shows.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.runs import (
    CHECKPOINT_EVERY,
    STEPS,
    Ended,
    Planned,
    Result,
    Run,
    Training,
    all_ended,
    assert_same_run,
    checkpoints,
    is_running,
    losses,
    newest_state,
    reference_run,
    run_many,
    write_recipe,
)

from moe.launch.local import GRACE_SECONDS
from moe.parallel.checkpoint import CheckpointError, verify
from moe.train.config import load_config
from moe.train.data import BatchLoader, build_data
from moe.train.metrics import read_metrics
from moe.train.run_folder import check_run_dir

SECONDS_TO_END = 30.0  # for processes to notice that another is gone


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reference_run(tmp_path_factory)


def recipe_like(reference: Run, folder: Path) -> Path:
    """The reference's recipe for a run below another folder, on the same data."""
    config = load_config(reference.recipe)
    data = config.data.model_dump()
    return write_recipe(folder, moe=config.moe, data={key: data[key] for key in ("source", "cache_dir")})


def events(run_dir: Path) -> list[str]:
    return [event["message"] for event in read_metrics(run_dir).events]


# --- one run that is stopped and killed in several ways, and resumed after each


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was seen when one fault hit the run."""

    ended: Ended | None
    last_step: int
    seconds: float
    orphans: list[int]
    newest: str
    model_exists: bool


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    dir: Path
    stopped: Stage
    worker_killed: Stage
    parent_killed: Stage
    spoilt: Path
    finished: Ended


def stage(training: Training, signals: dict[int, int], wait_for_parent: bool = True) -> Stage:
    """Send signals (by pid) at once and see what comes of it."""
    pids = [*training.workers().values(), training.process.pid]
    assert len(pids) == 3
    begin = time.monotonic()
    for pid, number in signals.items():
        os.kill(pid, number)
    ended = training.end() if wait_for_parent else None
    if not wait_for_parent:
        training.process.wait()
        all_ended(pids, SECONDS_TO_END)
    orphans = [pid for pid in pids if is_running(pid)]
    seconds = time.monotonic() - begin
    training.kill()
    return Stage(
        ended=ended,
        last_step=read_metrics(training.run_dir).train[-1]["step"],
        seconds=seconds,
        orphans=orphans,
        newest=checkpoints(training.run_dir)[-1].name,
        model_exists=(training.run_dir / "model").exists(),
    )


@pytest.fixture(scope="module")
def disturbed(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    rng = random.Random(20)
    recipe = recipe_like(reference, tmp_path_factory.mktemp("disturbed"))
    run_dir = recipe.parent / "runs" / "run"

    training = Training(recipe)
    training.wait_for_step(run_dir, rng.randint(2, 6))
    # As Slurm does: every process of the job gets the signal, and the parent passes its own on as well.
    everyone = [training.process.pid, *training.workers().values()]
    stopped = stage(training, dict.fromkeys(everyone, signal.SIGTERM))

    training = Training(recipe, "--resume")
    training.wait_for_step(run_dir, rng.randint(13, 17))
    worker_killed = stage(training, {training.workers()[rng.randrange(2)]: signal.SIGKILL})

    training = Training(recipe, "--resume")
    training.wait_for_step(run_dir, rng.randint(22, 26))
    parent_killed = stage(training, {training.process.pid: signal.SIGKILL}, wait_for_parent=False)

    spoilt = checkpoints(run_dir)[-1] / f"rank-{rng.randrange(2):04d}.safetensors"
    os.truncate(spoilt, spoilt.stat().st_size - 100)
    finished = Training(recipe, "--resume").end()
    return Disturbed(
        dir=run_dir,
        stopped=stopped,
        worker_killed=worker_killed,
        parent_killed=parent_killed,
        spoilt=spoilt,
        finished=finished,
    )


def test_sigterm_ends_with_a_checkpoint_and_status_0(disturbed: Disturbed) -> None:
    stopped = disturbed.stopped
    assert stopped.ended is not None
    assert stopped.ended.status == 0, stopped.ended.stderr[-3000:]
    assert "resumable" in stopped.ended.stderr and "--resume" in stopped.ended.stderr
    assert stopped.last_step < STEPS
    assert stopped.newest == f"step-{stopped.last_step:08d}"
    assert not stopped.model_exists
    assert not stopped.orphans


def test_a_killed_worker_ends_the_run_with_its_status(disturbed: Disturbed) -> None:
    killed = disturbed.worker_killed
    assert killed.ended is not None
    assert killed.ended.status == 128 + signal.SIGKILL
    assert killed.seconds < GRACE_SECONDS
    assert "ended with status -9: stopping the others" in killed.ended.stderr
    assert not killed.orphans
    assert disturbed.stopped.last_step < killed.last_step < STEPS


def test_a_killed_parent_takes_its_workers_along(disturbed: Disturbed) -> None:
    killed = disturbed.parent_killed
    assert not killed.orphans
    assert disturbed.worker_killed.last_step < killed.last_step < STEPS


def test_each_resume_says_where_it_starts(disturbed: Disturbed) -> None:
    resumed = [message for message in events(disturbed.dir) if message.startswith("resumed")]
    names = [message.split("(")[1].rstrip(")") for message in resumed]
    before_the_spoilt = f"step-{int(disturbed.spoilt.parent.name.split('-')[1]) - CHECKPOINT_EVERY:08d}"
    assert names == [disturbed.stopped.newest, disturbed.worker_killed.newest, before_the_spoilt]


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_is_used(disturbed: Disturbed) -> None:
    refused = [message for message in events(disturbed.dir) if message.startswith("checkpoint refused")]
    assert len(refused) == 1
    assert str(disturbed.spoilt) in refused[0] and "truncated" in refused[0]
    assert refused[0] in disturbed.finished.stderr


def test_the_disturbed_run_ends_as_the_undisturbed_one(disturbed: Disturbed, reference: Run) -> None:
    assert disturbed.finished.status == 0, disturbed.finished.stderr[-3000:]
    assert_same_run(disturbed.dir, reference.dir)
    for path in checkpoints(disturbed.dir):
        verify(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_alone(reference: Run, tmp_path: Path, number: signal.Signals) -> None:
    recipe = recipe_like(reference, tmp_path)
    training = Training(recipe)
    training.wait_for_step(training.run_dir, random.Random(number).randint(2, 20))
    seen = stage(training, {training.process.pid: number})
    assert seen.ended is not None
    assert seen.ended.status == 0, seen.ended.stderr[-3000:]
    assert "resumable" in seen.ended.stderr
    assert Training(recipe, "--resume").end().status == 0
    assert_same_run(training.run_dir, reference.dir)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_resume_is_exact_in_every_zero_stage(reference: Run, tmp_path: Path, zero_stage: int) -> None:
    recipe = recipe_like(reference, tmp_path)
    override = f"parallel.zero_stage={zero_stage}"
    (result,) = run_many(recipe, [Planned(name="undisturbed", overrides=[override])])
    assert result.status == 0, result.error
    training = Training(recipe, override)
    training.wait_for_step(training.run_dir, random.Random(zero_stage).randint(2, 20))
    training.process.send_signal(signal.SIGTERM)
    assert training.end().status == 0
    assert newest_state(training.run_dir)["step"] < STEPS
    assert Training(recipe, override, "--resume").end().status == 0
    assert_same_run(training.run_dir, recipe.parent / "runs" / "undisturbed")


def test_sigterm_during_setup_ends_at_once_and_blocks_nothing(reference: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)  # its own data and cache: the tokens are still to be made
    training = Training(recipe)
    training.wait_until(lambda: len(training.workers()) == 2, "two workers")
    seen = time.monotonic()
    workers = list(training.workers().values())
    training.process.send_signal(signal.SIGTERM)
    ended = training.end(SECONDS_TO_END)
    assert time.monotonic() - seen < SECONDS_TO_END
    assert ended.status == 128 + signal.SIGTERM
    assert not any(is_running(pid) for pid in workers)
    check_run_dir(training.run_dir, resume=False)
    config = load_config(recipe)
    (sample,) = build_data(config.data).train.rank_samples(0, 1, 0, 1)
    assert sample.input_ids_L.shape == (32,), "the cache is whole or absent"


# --- a full disk


def mounted(folder: Path, size: int) -> bool:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(reference: Run, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint folder of a run to come, on a disk with room for one and a half checkpoints."""
    size = sum(file.stat().st_size for file in checkpoints(reference.dir)[-1].iterdir())
    folder = tmp_path / "runs" / "run" / "checkpoints"
    if not mounted(folder, size * 3 // 2):
        pytest.skip("mounting a tmpfs is not permitted here (it takes root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(reference: Run, small_disk: Path, tmp_path: Path) -> None:
    recipe, run_dir = recipe_like(reference, tmp_path), tmp_path / "runs" / "run"
    run = Planned(name="run", overrides=[], resume=True)  # the folder exists: it is where the disk is mounted
    (result,) = run_many(recipe, [run])
    first = small_disk / f"step-{CHECKPOINT_EVERY:08d}"
    # At the end it tries once more.
    failed = list(dict.fromkeys(message for message in events(run_dir) if "failed" in message))
    assert len(failed) == STEPS // CHECKPOINT_EVERY - 1, "it went on, and tried again"
    for index, message in enumerate(failed, start=2):
        assert f"checkpoint at step {index * CHECKPOINT_EVERY} failed, the last good one is {first.name}" in message
        assert "No space left" in message
    assert losses(run_dir) == reference.losses, "training itself was not disturbed"
    assert result.status == 3, "without its last checkpoint a run is not finished"
    assert f"error: {failed[-1]}" in result.stderr
    assert checkpoints(run_dir) == [first]
    verify(first)
    assert not list(small_disk.glob(".partial*")), "nothing keeps the disk full"

    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert [result.status for result in run_many(recipe, [run])] == [0]
    assert f"resumed from step {CHECKPOINT_EVERY} ({first.name})" in events(run_dir)
    assert_same_run(run_dir, reference.dir)


# --- losses that are no numbers, and resuming what is not the same run; all in two processes

GOOD_STEPS, LIMIT, NAN_STEP = 4, 3, 5
ZERO_STAGES = (0, 1, 3)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Runs of `run_many` by name, in the order of their results."""

    recipe: Path
    results: dict[str, list[Result]]

    def dir(self, name: str) -> Path:
        return self.recipe.parent / "runs" / name


@pytest.fixture(scope="module")
def batch(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    text = load_config(reference.recipe).data
    recipe = write_recipe(
        folder,
        data={"source": text.source, "cache_dir": text.cache_dir},
        train={"steps": GOOD_STEPS, "checkpoint_every": 1, "max_nonfinite_steps": LIMIT},
    )
    runs = []
    for stage in ZERO_STAGES:
        zero = f"parallel.zero_stage={stage}"
        runs.append(Planned(name=f"diverging-{stage}", overrides=[zero]))
        blown_up = [zero, "train.steps=40", "optim.lr=1e30", "optim.clip=0", "optim.schedule=constant"]
        runs.append(Planned(name=f"diverging-{stage}", overrides=blown_up, resume=True))
        runs.append(Planned(name=f"nan-{stage}", overrides=[zero, "train.steps=10"], nan_steps=(NAN_STEP,)))
    hopeless = tuple(range(NAN_STEP, NAN_STEP + LIMIT))
    runs.append(Planned(name="hopeless", overrides=["train.steps=10"], nan_steps=hopeless))
    others = ["moe.num_experts=8", "moe.router.score=sigmoid", "model.decoder.rms_norm_eps=0.001", "data.seed=1"]
    runs += [Planned(name="diverging-1", overrides=[other], resume=True) for other in others]
    found: dict[str, list[Result]] = {}
    for run, result in zip(runs, run_many(recipe, runs), strict=True):
        found.setdefault(run.name, []).append(result)
    return Batch(recipe=recipe, results=found)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_a_diverging_run_stops_and_keeps_its_good_checkpoint(batch: Batch, stage: int) -> None:
    name = f"diverging-{stage}"
    assert [result.status for result in batch.results[name][:2]] == [0, 3]
    messages = [message for message in events(batch.dir(name)) if message.startswith("non-finite")]
    first_bad = GOOD_STEPS + 2  # after the step that ruined the weights
    expected = [f"at step {first_bad + i}: step skipped ({i + 1} in a row)" for i in range(LIMIT)]
    assert [message.partition("loss ")[2] or message.partition("gradient ")[2] for message in messages] == expected
    names = [path.name for path in checkpoints(batch.dir(name))]
    assert names == [f"step-{step:08d}" for step in (GOOD_STEPS, GOOD_STEPS + 1)], (
        "none was made while it was going wrong"
    )
    for path in checkpoints(batch.dir(name)):
        verify(path)


def test_the_documents_of_the_last_batch_are_named(batch: Batch) -> None:
    """Of the rank whose loss is no number, and of no other."""
    (result,) = batch.results["hopeless"]
    assert result.status == 3
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    last_step = NAN_STEP + LIMIT
    assert f"{LIMIT} steps in a row had a non-finite loss; stopped at step {last_step}" in line
    config = load_config(batch.recipe)
    loader = BatchLoader(build_data(config.data).train, config.train.micro_batch_size, rank=1, world_size=2)
    for _ in range(last_step):
        batches = loader.next_step()
    documents = {document for micro in batches for ids in micro.document_ids for document in ids}
    named = line.partition("Documents of the last batch: ")[2].partition(". Look at them")[0]
    assert named.split(", ") == sorted(documents)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_one_bad_step_on_one_rank_is_skipped_by_all(batch: Batch, stage: int) -> None:
    name = f"nan-{stage}"
    assert [result.status for result in batch.results[name]] == [0]
    records = {record["step"]: record for record in read_metrics(batch.dir(name)).train}
    assert records[NAN_STEP + 1]["loss"] is None
    assert [records[step]["skipped_steps"] for step in (NAN_STEP, NAN_STEP + 1, 10)] == [0, 1, 1]
    assert events(batch.dir(name)) == [f"non-finite loss at step {NAN_STEP + 1}: step skipped (1 in a row)"]
    after = [records[step]["loss"] for step in range(NAN_STEP + 2, 11)]
    assert all(loss is not None and loss < records[1]["loss"] for loss in after)
    summary = json.loads((batch.dir(name) / "summary.json").read_text(encoding="utf-8"))
    assert summary["skipped_steps"] == 1


@pytest.mark.parametrize("stage", ZERO_STAGES[1:])
def test_a_skipped_step_is_the_same_in_every_zero_stage(batch: Batch, stage: int) -> None:
    def finite(name: str) -> dict[int, float]:
        return {step: loss for step, loss in losses(batch.dir(name)).items() if step != NAN_STEP + 1}

    assert finite(f"nan-{stage}") == pytest.approx(finite("nan-0"), rel=1e-4)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        (0, ["another model", "moe.num_experts is 4 there and 8 here"]),
        (1, ["another model", "moe.router.score", "'sigmoid' here"]),
        (2, ["another model", "rms_norm_eps", "0.001 here"]),
        (3, ["other data"]),
    ],
)
def test_resuming_another_model_or_other_data_is_refused(batch: Batch, index: int, parts: list[str]) -> None:
    result = batch.results["diverging-1"][2 + index]
    assert result.status == 2
    assert all(part in result.error for part in parts), result.error
    assert "step-" in result.error


def test_a_refused_resume_destroys_nothing(batch: Batch) -> None:
    """After four refusals, the folder is as the last real run left it."""
    run_dir = batch.dir("diverging-1")
    written = load_config(run_dir / "config.yaml")
    assert written.optim.lr == 1e30
    assert written.moe is not None and written.moe["num_experts"] == 4
    assert read_metrics(run_dir).train[-1]["step"] == GOOD_STEPS + LIMIT
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000004", "step-00000005"]


# --- checkpoints that cannot be trusted


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_with_no_valid_checkpoint_left_the_run_starts_over_and_says_so(reference: Run, tmp_path: Path) -> None:
    recipe = recipe_like(reference, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    shutil.copytree(reference.dir, run_dir)
    spoilt = [path / "rank-0001.safetensors" for path in checkpoints(run_dir)]
    for file in spoilt:
        flip_last_bit(file)
        with pytest.raises(CheckpointError, match="corrupted"):
            verify(file.parent)
    training = Training(recipe, "--resume", "train.keep_last=1")
    training.wait_for_step(run_dir, 12)
    training.process.send_signal(signal.SIGTERM)
    ended = training.end()
    assert ended.status == 0, ended.stderr[-3000:]
    assert all(str(file) in ended.stderr for file in spoilt)
    assert "starting at step 0" in ended.stderr
    stopped_at = read_metrics(run_dir).train[-1]["step"]
    ended = Training(recipe, "--resume", "train.keep_last=1").end()
    assert f"resumed from step {stopped_at}" in ended.stderr, "a spoilt newer checkpoint must not crowd out a good one"
    assert_same_run(run_dir, reference.dir)
