"""``faults``: random kills and stalls of a real run of two processes, which must end as the run that nothing disturbed.

``kills``: one ``moe train`` whose ranks are killed at random times, a third of them while a checkpoint is being written; the
launcher starts them again. ``stalls``: a rank sleeps or is stopped in the data loader, the router, the experts or the optimizer
step, and must be named within ``parallel.stall_seconds``. Rows are one per fault and one total. `FAULTS_KILLS`, `FAULTS_STALLS`
and `FAULTS_SEED` in the environment change the numbers (50, 20, 0); rows say what they were.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from benchmarks.faults_worker import MANNERS, PLACES, began_file
from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from moe.parallel.checkpoint import list_checkpoints
from moe.train.metrics import read_metrics

STEPS_BETWEEN_KILLS, CHECKPOINT_EVERY, QUICK_FAULTS = 12, 5, 3
STALL_SECONDS = 5.0
WAIT_SECONDS = 300.0  # for anything to happen
POLL_SECONDS = 0.002


def _number(name: str, default: int, options: Options) -> int:
    return min(QUICK_FAULTS, default) if options.quick else int(os.environ.get(f"FAULTS_{name}", default))


def _seed() -> int:
    return int(os.environ.get("FAULTS_SEED", 0))


def _recipe(folder: Path, num_kills: int) -> Path:
    """A model whose steps take some hundredths of a second, with noise in the router: a lost random state would show."""
    words = random.Random(1).choices(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], k=20_000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    values = {
        "model": {
            "decoder": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
            }
        },
        "moe": {"num_experts": 4, "router": {"name": "topk", "top_k": 2, "jitter": 0.05}},
        "data": {
            "source": str(folder / "text.txt"),
            "cache_dir": str(folder / "cache"),
            "seq_len": 32,
            "eval_fraction": 0.1,
            "tokenizer": {"vocab_size": 300},
        },
        "optim": {"lr": 0.003, "warmup_steps": 2},
        "train": {
            "steps": STEPS_BETWEEN_KILLS * (num_kills + 2),
            "batch_size": 8,
            "micro_batch_size": 4,
            "checkpoint_every": CHECKPOINT_EVERY,
            "eval_windows": 8,
            "sample_tokens": 0,
        },
        "parallel": {"processes": 2, "ep_size": 2, "device": "cpu", "timeout_seconds": 240, "stall_seconds": 60},
        "log": {"run_root": str(folder / "runs"), "wandb": "off"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: the losses that lead to its weights, the last held-out loss, and the weights."""

    losses: dict[int, float]
    eval_loss: float
    weights: dict[str, torch.Tensor]

    def equals(self, other: "Result") -> bool:
        """To the last bit."""
        same = self.weights.keys() == other.weights.keys()
        same = same and all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())
        return same and self.losses == other.losses and self.eval_loss == other.eval_loss


def _result(run_dir: Path) -> Result:
    metrics = read_metrics(run_dir)
    return Result(
        losses={record["step"]: record["loss"] for record in metrics.train},
        eval_loss=metrics.evals[-1]["loss"],
        weights=load_file(run_dir / "model" / "model.safetensors"),
    )


@dataclass
class _Run:
    """A command in the background, its stderr in a file."""

    process: "subprocess.Popen[bytes]"
    err: Path

    def wait_until(self, happened: Callable[[], Any], what: str) -> Any:
        """The first true value; an error when the command ends before, or nothing happens for long."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (value := happened()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {what}; status {self.process.poll()}:\n{self.text()[-3000:]}")
            time.sleep(POLL_SECONDS)
        return value

    def text(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> dict[int, int]:
        """Pids of the training processes by rank."""
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(text[5:]): int(pid) for text in variables if text.startswith(b"RANK=")}
        return found


@contextmanager
def _started(arguments: list[str], folder: Path) -> Iterator[_Run]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    err = folder / "stderr.txt"
    with err.open("wb") as file:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        yield _Run(process, err)
    finally:
        process.kill()  # what it started ends with it
        process.wait()


def _train(recipe: Path, name: str, *overrides: str) -> list[str]:
    return ["-m", "moe.cli", "train", str(recipe), f"name={name}", *overrides]


def _undisturbed(recipe: Path, name: str) -> Result:
    with _started(_train(recipe, name), recipe.parent) as run:
        if status := run.process.wait():
            raise RuntimeError(f"the undisturbed run ended with status {status}:\n{run.text()[-3000:]}")
    return _result(recipe.parent / "runs" / name)


def gate(options: Options) -> list[Check]:
    """Two runs that nothing disturbs are the same to the last bit; else the comparison below would mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), num_kills=1)
        first, second = (_undisturbed(recipe, name) for name in ("first", "second"))
    return [Check(name="two undisturbed runs differ", error=float(not first.equals(second)), limit=0.0)]


class _Tail:
    """Reads what is appended to a run's metrics."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._offset = run_dir / "metrics.jsonl", 0
        self.step, self.resumed = 0, list[int]()
        self.refused = 0

    def read(self) -> None:
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._offset:  # a line cut short by a kill was cut off
            self._offset = self._path.stat().st_size
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.step = record["step"]
        elif record["kind"] == "event":
            message = record["message"]
            self.refused += message.startswith("checkpoint refused")
            if match := re.match(r"resumed from step (\d+)", message):
                self.resumed.append(int(match[1]))
            elif message.startswith("no valid checkpoint to resume from"):
                self.resumed.append(0)

    def reached(self, step: int) -> bool:
        self.read()
        return self.step >= step


def _kills(options: Options, folder: Path) -> list[Row]:
    num_kills, draw = _number("KILLS", 50, options), random.Random(_seed())
    recipe = _recipe(folder, num_kills)
    expected = _undisturbed(recipe, "undisturbed")
    run_dir, rows = folder / "runs" / "killed", list[Row]()
    tail, began = _Tail(run_dir), time.monotonic()
    with _started(_train(recipe, "killed", f"parallel.max_restarts={num_kills}"), folder) as run:
        for index in range(num_kills):
            target = STEPS_BETWEEN_KILLS * (index + 1) + draw.randrange(STEPS_BETWEEN_KILLS)
            run.wait_until(lambda target=target: tail.reached(target), f"step {target}")
            row = _kill(run, run_dir, draw, during_checkpoint=index % 3 == 0)
            killed_at = time.monotonic()
            tail.read()
            row |= {"part": "kills", "index": index, "step": tail.step}
            number = len(tail.resumed)
            run.wait_until(lambda n=number: tail.reached(10**9) or len(tail.resumed) > n, f"restart {index + 1}")
            row["resumed_from"], row["seconds"] = tail.resumed[-1], round(time.monotonic() - killed_at, 2)
            # What was whole before the kill must be there after it.
            row["ok"] = int(tail.resumed[-1] >= int(row["newest_before"] or 0) and tail.refused == 0)
            rows.append(row)
            options.report(f"kill {index + 1} of {num_kills}: {row}")
        status = run.process.wait(timeout=WAIT_SECONDS)
    same = status == 0 and _result(run_dir).equals(expected)
    total: Row = {
        "part": "kills",
        "fault": "total",
        "num_faults": num_kills,
        "num_ok": sum(int(row["ok"] or 0) for row in rows),
        "num_in_checkpoint": sum(int(row["in_checkpoint"] or 0) for row in rows),
        "status": status,
        "same_as_undisturbed": int(same),
        "eval_loss": read_metrics(run_dir).evals[-1]["loss"] if status == 0 else None,
        "expected_loss": expected.eval_loss,
        "ok": int(same and all(row["ok"] for row in rows)),
        "seconds": round(time.monotonic() - began, 1),
        "seed": _seed(),
    }
    return [*rows, total]


def _kill(run: _Run, run_dir: Path, draw: random.Random, during_checkpoint: bool) -> Row:
    root = run_dir / "checkpoints"

    def partial() -> bool:
        return any(root.glob(".partial-step-*"))

    if during_checkpoint:
        run.wait_until(partial, "checkpoint being written")
        time.sleep(draw.random() * 0.02)
    else:
        time.sleep(draw.random() * 0.2)
    rank = draw.randrange(2)
    pid = run.workers()[rank]
    in_checkpoint = partial()
    newest = list_checkpoints(root)
    os.kill(pid, signal.SIGKILL)
    return {
        "fault": "kill",
        "rank": rank,
        "in_checkpoint": int(in_checkpoint),
        "newest_before": int(newest[-1].name.split("-")[1]) if newest else 0,
    }


def _stalls(options: Options, folder: Path) -> list[Row]:
    num_stalls, draw = _number("STALLS", 20, options), random.Random(_seed() + 1)
    cells = [(place, manner) for place in PLACES for manner in MANNERS]
    stalls = []
    for index in range(num_stalls):
        place, manner = cells[index % len(cells)]
        stalls.append(
            {"place": place, "manner": manner, "rank": draw.randrange(2), "after_steps": draw.randrange(2, 9)}
        )
    plan = folder / "plan.json"
    plan.write_text(json.dumps(stalls), encoding="utf-8")
    recipe = _recipe(folder, num_stalls)
    expected = _undisturbed(recipe, "undisturbed")
    run_dir, rows, began = folder / "runs" / "stalled", list[Row](), time.monotonic()
    overrides = [str(recipe), "name=stalled", f"parallel.stall_seconds={STALL_SECONDS}"]
    with _started(["-m", "benchmarks.faults_worker", "launch", str(plan), *overrides], folder) as run:
        offset = 0
        for index, stall in enumerate(stalls):
            begin = float(
                run.wait_until(began_file(plan, index).exists, "stall") and began_file(plan, index).read_text()
            )
            lines = run.wait_until(lambda o=offset: _accusations(run.text()[o:]), "accusation")
            seconds = time.time() - begin
            run.wait_until(lambda i=index: f"restart {i + 1} of" in run.text(), "restart")
            offset = len(run.text())
            named = re.match(r"stall: rank (\d+) ", lines[0])
            # Of a process that is stopped, the others know its last sign of life only, which is older than where it is.
            said = "has been silent" if stall["manner"] == "stop" else PLACES[stall["place"]][0]
            right = named is not None and int(named[1]) == stall["rank"] and said in lines[0]
            row: Row = {
                "part": "stalls",
                "fault": f"{stall['manner']} in {stall['place']}",
                "index": index,
                "rank": stall["rank"],
                "limit": STALL_SECONDS,
                "seconds": round(seconds, 2),
                "ok": int(right and len(lines) == 1 and seconds <= STALL_SECONDS),
            }
            rows.append(row)
            options.report(f"stall {index + 1} of {num_stalls}: {row}; {lines[0]}")
        status = run.process.wait(timeout=WAIT_SECONDS)
    same = status == 0 and _result(run_dir).equals(expected)
    total: Row = {
        "part": "stalls",
        "fault": "total",
        "num_faults": num_stalls,
        "num_ok": sum(int(row["ok"] or 0) for row in rows),
        "status": status,
        "same_as_undisturbed": int(same),
        "eval_loss": read_metrics(run_dir).evals[-1]["loss"] if status == 0 else None,
        "expected_loss": expected.eval_loss,
        "ok": int(same and all(row["ok"] for row in rows)),
        "limit": STALL_SECONDS,
        "seconds": round(time.monotonic() - began, 1),
        "seed": _seed(),
    }
    return [*rows, total]


def _accusations(text: str) -> list[str]:
    """Whole lines that name a rank."""
    return [line for line in text.split("\n")[:-1] if line.startswith("stall: ")]


_PARTS = {"kills": _kills, "stalls": _stalls}


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for name, measure in _PARTS.items():
        if options.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(options, Path(folder))
    return rows


BENCHMARK = Benchmark(
    name="faults",
    description="random kills and stalls of a training run: every restart resumes, every stall is named",
    columns=(
        "part",
        "fault",
        "index",
        "rank",
        "step",
        "in_checkpoint",
        "newest_before",
        "resumed_from",
        "limit",
        "seconds",
        "ok",
        "num_faults",
        "num_ok",
        "num_in_checkpoint",
        "status",
        "same_as_undisturbed",
        "eval_loss",
        "expected_loss",
        "seed",
    ),
    table=("part", "fault", "rank", "step", "in_checkpoint", "resumed_from", "seconds", "ok", "num_faults", "num_ok"),
    gate=gate,
    run=run,
    parts=tuple(_PARTS),
)
