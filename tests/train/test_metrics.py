"""Metrics: strict JSON on disk, tolerant reading, routing statistics, model FLOPs, and Weights & Biases that stays quiet."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.train.metrics import (
    MetricsWriter,
    flatten,
    mean_balance,
    model_flops_per_token,
    peak_flops,
    peak_flops_by_name,
    read_metrics,
)
from moe.train.wandb_mirror import resolve_wandb_mode

NETWORK_SETTINGS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC")


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nobody is logged in, whatever the machine's own environment says. Gives the home folder."""
    for name in NETWORK_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def train(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, **more}


def write_lines(run: Path, *records: dict[str, Any] | str) -> Path:
    run.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return run


# --- writing


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with MetricsWriter(tmp_path / "run", "off") as writer:
        layer = {
            "load": torch.tensor([0.25, 0.75]),
            "max_violation": torch.tensor(float("inf")),
            "losses": {"z": -math.inf},
        }
        writer.log(train(1, float("nan"), layers={0: layer}, seconds=torch.tensor(2.0), count=torch.tensor(3)))
        writer.log({"kind": "event", "step": 1, "message": "zwölf\nlines"})
        # Already on disk: a killed process must not take its last numbers along.
        lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first["loss"] is None and first["seconds"] == 2.0 and first["count"] == 3
    assert first["layers"]["0"] == {"load": [0.25, 0.75], "max_violation": None, "losses": {"z": None}}
    assert second["message"] == "zwölf\nlines"


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    write_lines(tmp_path, train(1))
    with pytest.raises(ValueError, match=r"already holds metrics\.jsonl: resume it, or"):
        MetricsWriter(tmp_path, "off")


def test_resume_appends_after_a_cut_line(tmp_path: Path) -> None:
    long = train(2, note="x" * 200_000)  # more than the block that the search for the last newline reads
    write_lines(tmp_path, train(1), json.dumps(long)[:-3])
    with MetricsWriter(tmp_path, "off", resume=True) as writer:
        writer.log(train(2, 0.5))
    metrics = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in metrics.train] == [(1, 1.0), (2, 0.5)]
    assert metrics.skipped_lines == 0


def test_resume_of_a_single_cut_line_and_of_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path, '{"kind": "tr')
    MetricsWriter(tmp_path, "off", resume=True).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    MetricsWriter(tmp_path / "new", "off", resume=True).close()
    assert read_metrics(tmp_path / "new").train == []


# --- reading


def test_truncated_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path, train(1), train(2), '{"kind": "train", "step": 3, "lo')
    metrics = read_metrics(tmp_path)
    assert [record["step"] for record in metrics.train] == [1, 2]
    assert metrics.skipped_lines == 1


def test_the_last_of_two_equal_steps_wins(tmp_path: Path) -> None:
    held_out = {"kind": "eval", "step": 2, "loss": 9.0}
    write_lines(tmp_path, train(1), train(2), held_out, train(2, 7.0), {**held_out, "loss": 5.0}, train(3))
    metrics = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in metrics.train] == [(1, 1.0), (2, 7.0), (3, 1.0)]
    assert [record["loss"] for record in metrics.evals] == [5.0]


def test_steps_after_the_resumed_checkpoint_belong_to_lost_weights(tmp_path: Path) -> None:
    evals = [{"kind": "eval", "step": step, "loss": float(step)} for step in (40, 50)]
    before = [train(step) for step in (39, 40)] + evals[:1] + [train(step) for step in (41, 50)] + evals[1:]
    event = {"kind": "event", "step": 40, "message": "resumed from step 40"}
    write_lines(tmp_path, *before, event, train(41, 3.0))
    metrics = read_metrics(tmp_path)
    assert [record["step"] for record in metrics.train] == [39, 40, 41]
    assert [record["step"] for record in metrics.evals] == [40]
    assert metrics.events == [event]


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path, "[]\n", "\n", '{"kind": "other", "step": 1}\n', '{"kind": "train"}\n', train(1))
    metrics = read_metrics(tmp_path)
    assert len(metrics.train) == 1 and metrics.skipped_lines == 3


def test_layers_are_ordered_as_numbers(tmp_path: Path) -> None:
    write_lines(tmp_path, train(1, layers={"10": {}, "2": {}}), train(2, layers=None), train(3, layers={"0": {}}))
    assert read_metrics(tmp_path).layer_names() == ["0", "2", "10"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "runs"
    if exists:
        folder.mkdir()
    with pytest.raises(ValueError) as error:
        read_metrics(folder)
    assert str(folder) in str(error.value)
    assert ("metrics.jsonl is missing" if exists else "does not exist") in str(error.value)


# --- statistics


def test_mean_balance() -> None:
    assert mean_balance([{"max_violation": 0.0}, {"max_violation": 1.0}, {"max_violation": None}]) == pytest.approx(
        0.75
    )
    assert mean_balance([]) is None


def test_peak_flops_by_device_name() -> None:
    assert peak_flops("cpu") is None
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops_by_name("NVIDIA H100 PCIe") == 756.5e12
    assert peak_flops_by_name("NVIDIA H200") == 989.5e12
    assert peak_flops_by_name("NVIDIA GB200") == 2500e12
    assert peak_flops_by_name("NVIDIA L40S") == 362e12
    assert peak_flops_by_name("NVIDIA L4") == 121e12
    assert peak_flops_by_name("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops_by_name("NVIDIA GeForce GTX 1080") is None


def test_model_flops_are_those_of_palm() -> None:
    # PaLM 540B (arXiv 2204.02311, table 1 and appendix B): 118 layers, 48 heads of 256, 2048 tokens. The paper reports 46.2% MFU
    # at 238.3k tokens per second on 6144 TPU v4 chips of 275 TFLOP/s.
    per_token = model_flops_per_token(540_350_000_000, 118, 48 * 256, 2048)
    assert 238.3e3 * per_token / (6144 * 275e12) == pytest.approx(0.462, abs=0.002)


# --- Weights & Biases


def test_flat_names() -> None:
    layer = {"load": [0.5, 0.5], "max_violation": 0.25, "dropped_fraction": None, "losses": {"switch": 1.5}}
    record = train(3, 2.0, mfu=None, layers={"0": layer})
    assert flatten(record) == {"train/loss": 2.0, "layer/0/max_violation": 0.25, "layer/0/losses/switch": 1.5}
    assert flatten({"kind": "eval", "step": 3, "loss": 1.0}) == {"eval/loss": 1.0}
    assert flatten({"kind": "event", "step": 3, "message": "x"}) == {}


def test_auto_mode_is_offline_unless_logged_in(logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_wandb_mode("auto") == "offline"
    netrc = logged_out / ".netrc"
    netrc.write_text("machine example.org login user password secret\n")
    netrc.chmod(0o600)
    assert resolve_wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert resolve_wandb_mode("auto") == "online"
    netrc.write_text("this is no netrc")
    assert resolve_wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_wandb_mode("auto") == "online"
    assert resolve_wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_wandb_mode("auto") == "off"


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb_mode='online' is not known: use one of auto, offline, off"):
        MetricsWriter(tmp_path / "run", "online")
    assert not (tmp_path / "run").exists()


def run_python(code: str, *args: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *args],
        env=os.environ | (env or {}), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_off_mode_does_not_import_wandb(tmp_path: Path) -> None:
    run_python(
        "import sys\n"
        "from moe.train.metrics import MetricsWriter\n"
        "import moe.train.report\n"
        "with MetricsWriter(sys.argv[1], 'off') as writer:\n"
        "    writer.log({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "assert 'wandb' not in sys.modules\n",
        str(tmp_path),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_offline_mode_writes_into_the_run_folder_and_connects_nowhere(
    logged_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every address that wandb could call, direct or through a proxy, is a local server that counts its callers."""
    callers: list[Any] = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            callers.append(address)
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    run = tmp_path / "run"
    code = (
        "import os, sys\n"
        "from moe.train.metrics import MetricsWriter\n"
        "before = dict(os.environ)\n"
        "with MetricsWriter(sys.argv[1], 'auto', 'project', {'lr': 1e-3}, resume=sys.argv[2] == 'resume') as writer:\n"
        "    kept = {name: os.environ.get(name) for name in before}\n"
        "    assert kept == before, 'the environment must be put back'\n"
        "    assert 'WANDB_ERROR_REPORTING' not in os.environ\n"
        "    for step in range(3):\n"
        "        writer.log({'kind': 'train', 'step': step, 'loss': 1.0, 'layers': {'0': {'load': [1.0]}}})\n"
        "assert 'wandb' in sys.modules\n"
    )
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    env = {**dict.fromkeys(names, url), "NO_PROXY": "", "no_proxy": ""}
    run_python(code, str(run), "new", env=env)
    run_python(code, str(run), "resume", env=env)
    server.close()
    assert callers == []
    runs = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) in (1, 2) and all(path.stat().st_size > 0 for path in runs)
    assert len({path.stem for path in runs}) == 1, "a resumed run keeps its id"
    assert not [path for path in logged_out.rglob("*") if path.is_file()], "nothing is written to the home folder"
    assert len(read_metrics(run).train) == 3


class BrokenRun:
    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, *args: Any) -> None:
        raise OSError("disk full")


class Settings:
    model_fields: dict[str, Any] = {}


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_failure_is_one_warning(
    where: str, logged_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**kwargs: Any) -> BrokenRun:
        if where == "init":
            raise OSError("disk full")
        return BrokenRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=Settings))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MetricsWriter(tmp_path / "run", "offline") as writer:
            for step in range(3):
                writer.log(train(step))
    assert [str(warning.message) for warning in caught if "disk full" in str(warning.message)] != []
    assert len(caught) == 1
    assert len(read_metrics(tmp_path / "run").train) == 3


def test_unreachable_server_means_offline(logged_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def init(mode: str, **kwargs: Any) -> BrokenRun:
        modes.append(mode)
        if mode == "online":
            raise OSError("no network")
        return BrokenRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=Settings))  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.warns(RuntimeWarning, match="recorded offline in .*: no network"):
        MetricsWriter(tmp_path / "run", "auto")
    assert modes == ["online", "offline"]
