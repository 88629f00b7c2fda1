"""Training runs through the real command: a tiny recipe, and processes to start, watch and end.

What is not about the command runs without it (`run_many`): to start it takes longer than to train what is trained here.
"""

import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.ranks import run_ranks
from moe.launch.env import LAUNCHER_VARIABLE
from moe.train.metrics import RunMetrics, read_metrics

STEPS, CHECKPOINT_EVERY = 40, 5
TIMEOUT = 300.0  # of anything that is waited for: a machine may be busy, a test must end
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def write_text(path: Path, num_lines: int = 1500, seed: int = 0) -> Path:
    """A text with something to learn: words of a small vocabulary, mostly in the order of the alphabet."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_lines):
        first = rng.randrange(len(WORDS))
        lines.append(" ".join(WORDS[(first + i) % len(WORDS)] for i in range(rng.randrange(4, 16))) + ".\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe of two processes with EP 2 and ZeRO-1 that keeps everything below ``folder``; sections are merged into it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    values: dict[str, Any] = {
        "name": "run",
        "model": {
            "decoder": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            }
        },
        "moe": {"num_experts": 4, "router": {"name": "topk", "top_k": 2}},
        "data": {
            "source": str(text if text.exists() else write_text(text)),
            "cache_dir": str(folder / "cache"),
            "seq_len": 32,
            "eval_fraction": 0.1,
            "tokenizer": {"vocab_size": 300},
        },
        "optim": {"lr": 0.01, "warmup_steps": 2},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 4,
            "checkpoint_every": CHECKPOINT_EVERY,
            "eval_windows": 10,
            "sample_prompt": "alpha",
            "sample_tokens": 0,
        },
        "parallel": {"processes": 2, "ep_size": 2, "zero_stage": 1, "device": "cpu", "timeout_seconds": 120},
        "log": {"run_root": str(folder / "runs"), "wandb": "off"},
    }
    for key, section in sections.items():
        values[key] = {**values[key], **section} if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def clean_environment() -> dict[str, str]:
    """This process's environment without what would tell a run about other launchers and devices; one thread each."""
    launchers = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "DS_ACCELERATOR",
        LAUNCHER_VARIABLE,
    )
    kept = {key: value for key, value in os.environ.items() if key not in launchers and not key.startswith("MASTER_")}
    helpers_root = str(Path(__file__).parents[1])
    path = os.pathsep.join([helpers_root, *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An ended command."""

    status: int
    stdout: str
    stderr: str


class Command:
    """A command that runs in the background, with its output in files (a pipe could fill up and block it)."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=clean_environment(), stdout=out, stderr=err, start_new_session=True
            )

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait until it ends by itself."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.stderr[-3000:]}") from None
        return Ended(status=status, stdout=self._out.read_text(encoding="utf-8"), stderr=self.stderr)

    def workers(self) -> dict[int, int]:
        """Pids of the training processes that it started, by rank."""
        found = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK=")]
                found.update(dict.fromkeys(ranks, pid))
        return found

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Poll until it has happened; fails when the command ends before, or after `TIMEOUT`."""
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.stderr[-3000:]}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no sign of {what} after {TIMEOUT} s:\n{self.stderr[-3000:]}")
            time.sleep(0.005)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Poll until the run's metrics show that a step from ``step`` on is done, since this command began."""
        path = run_dir / "metrics.jsonl"
        begin = self._metrics_before.get(run_dir, 0)

        def happened() -> bool:
            if not path.exists():
                return False
            with path.open("rb") as file:
                file.seek(begin)
                lines = file.read().split(b"\n")[:-1]
            records = [json.loads(line) for line in lines]
            return any(record["kind"] == "train" and record["step"] >= step for record in records)

        self.wait_until(happened, f"step {step}")

    _metrics_before: dict[Path, int] = {}

    def kill(self) -> None:
        """SIGKILL to it and to what it started."""
        for pid in [*self.workers().values(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Training(Command):
    """``moe train`` in the background."""

    def __init__(self, recipe: Path, *arguments: str, name: str = "run") -> None:
        self.run_dir = recipe.parent / "runs" / name
        path = self.run_dir / "metrics.jsonl"
        # A resumed run first cuts off a line that a kill left unfinished.
        self._metrics_before = {self.run_dir: path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0}
        super().__init__(["-m", "moe.cli", "train", str(recipe), f"name={name}", *arguments], recipe.parent)


def run_moe(*arguments: str, folder: Path, timeout: float = TIMEOUT) -> Ended:
    """Run ``moe ARGUMENTS`` to its end."""
    return Command(["-m", "moe.cli", *arguments], folder).end(timeout)


def children(parent: int) -> list[int]:
    """Pids of the living children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent_pid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent_pid) == parent and state != "Z":
                    found.append(int(entry.name))
    return found


def descendants(parent: int) -> list[int]:
    """Pids of the living children of a process, and of theirs."""
    found = children(parent)
    return found + [pid for child in found for pid in descendants(child)]


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def all_ended(pids: list[int], timeout: float) -> bool:
    """Whether all processes end within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in its folder."""

    recipe: Path
    dir: Path
    ended: Ended

    @property
    def metrics(self) -> RunMetrics:
        return read_metrics(self.dir)

    @property
    def losses(self) -> dict[int, float]:
        return losses(self.dir)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.dir / "summary.json").read_text(encoding="utf-8"))


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, of the steps that lead to the run's final weights."""
    return {record["step"]: record["loss"] for record in read_metrics(run_dir).train}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Losses of all steps, held-out losses, exported weights and the data position are the same to the last bit."""
    ours, theirs = read_metrics(run_dir), read_metrics(other)
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "layers")
    for record, expected in zip(ours.train, theirs.train, strict=True):
        assert {key: record[key] for key in keys} == {key: expected[key] for key in keys}
    assert ours.evals[-1] == theirs.evals[-1]
    found, expected_weights = weights(run_dir), weights(other)
    assert found.keys() == expected_weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected_weights[name]), name
    assert newest_state(run_dir)["loader"] == newest_state(other)["loader"]


def newest_state(run_dir: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    return json.loads((checkpoints(run_dir)[-1] / "state.json").read_text(encoding="utf-8"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def reference_run(factory: pytest.TempPathFactory) -> Run:
    """One undisturbed run for all tests, with noise in the router so that random states matter, and with ``--json``."""
    return _reference_run(factory.getbasetemp())


@functools.cache
def _reference_run(base: Path) -> Run:
    moe_section = {"num_experts": 4, "router": {"name": "topk", "top_k": 2, "jitter": 0.05}}
    recipe = write_recipe(base / "reference", moe=moe_section)
    ended = run_moe("train", str(recipe), "--json", "train.sample_tokens=4", folder=recipe.parent)
    assert ended.status == 0, ended.stderr[-3000:]
    return Run(recipe=recipe, dir=recipe.parent / "runs" / "run", ended=ended)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of `run_many`: ``overrides`` on the recipe; a second one of the same name goes on in the same folder.

    nan_steps: the losses of these steps (from 0) become NaN on the last rank, and on no other.
    slow_rank, slow_seconds: a rank that takes this much longer to fetch the batches of a step.
    """

    name: str
    overrides: list[str]
    resume: bool = False
    nan_steps: tuple[int, ...] = ()
    slow_rank: int = 0
    slow_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run of `run_many` ended: as `moe.launch.train` would exit, its message for status 2, and rank 0's stderr."""

    status: int
    error: str
    stderr: str


def run_many(recipe: Path, runs: list[Planned], processes: int = 2) -> list[Result]:
    """Make runs in the same processes, one after the other."""
    environment = clean_environment() | {"LOCAL_WORLD_SIZE": str(processes)}
    with mock.patch.dict(os.environ, environment, clear=True):
        return run_ranks(_make_runs, processes, recipe, runs, timeout=2 * TIMEOUT)[0]


def _make_runs(rank: int, world_size: int, recipe: Path, runs: list[Planned]) -> list[Result]:
    from moe.launch import train
    from moe.parallel.ranks import init_ranks
    from moe.train.config import load_config

    ranks = init_ranks("cpu", timeout_seconds=120)  # takes the group that exists
    results = []
    for run in runs:
        error, said = "", io.StringIO()
        overrides = [f"name={run.name}", f"parallel.processes={world_size}", *run.overrides]
        try:
            config = load_config(recipe, overrides)
            slow = _slow_data(run.slow_seconds * (rank == run.slow_rank))
            with _nan_losses(run.nan_steps), slow, redirect_stderr(said):
                status = train.run(config, ranks, run.resume)
        except ValueError as problem:
            status, error = 2, str(problem)
        finally:
            print(said.getvalue(), file=sys.stderr)
        results.append(Result(status=status, error=error, stderr=said.getvalue()))
    return results


@contextmanager
def _nan_losses(steps: tuple[int, ...]) -> Iterator[None]:
    from moe.train.trainer import Trainer

    original = Trainer._loss

    def loss(self: Trainer, *arguments: Any) -> torch.Tensor:
        value = original(self, *arguments)
        poisoned = self.step in steps and self.ranks.rank == self.ranks.world_size - 1
        return value * float("nan") if poisoned else value

    with mock.patch.object(Trainer, "_loss", loss):
        yield


@contextmanager
def _slow_data(seconds: float) -> Iterator[None]:
    from moe.train.data import BatchLoader

    original = BatchLoader.next_step

    def next_step(self: BatchLoader) -> Any:
        time.sleep(seconds)
        return original(self)

    with mock.patch.object(BatchLoader, "next_step", next_step):
        yield
