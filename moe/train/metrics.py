"""A run's numbers: written as JSON lines while it trains, read back for the report, and the formulas behind them.

`metrics.jsonl` holds one strict-JSON object a line with a `kind`: `train` (loss, speed, routing of every MoE layer),
`eval` or `event`. It is append-only, so a killed run loses at most its last line, and it is the single source of the
report; Weights & Biases gets a copy.

Model FLOPs follow PaLM, appendix B (arXiv 2204.02311); maximal violation follows the auxiliary-loss-free balancing
paper (arXiv 2408.15664, eq. 4). Shapes: E experts.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from moe.train.wandb_mirror import WandbMirror

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]

# Dense (not sparse) bf16 peak in FLOP/s of one device, from the vendors' data sheets. Keys are whole words of the
# device name that torch reports; the longest match wins, so "H100 PCIe" is not taken for the SXM board, which torch
# calls "H100 80GB HBM3".
_PEAK_FLOPS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "H20": 148e12,
    "H100": 989.5e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H200": 989.5e12,
    "H200 NVL": 835.5e12,
    "H800": 989.5e12,
    "GH200": 989.5e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209.5e12,
    "MI250X": 383e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
}


def mean_balance(layers: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean over layer records of 1 / (1 + max_violation), mean load over greatest load: 1 is even. None without layers."""
    values = [layer["max_violation"] for layer in layers if layer.get("max_violation") is not None]
    return sum(1 / (1 + float(value)) for value in values) / len(values) if values else None


def peak_flops(device: torch.device | str) -> float | None:
    """Peak dense bf16 FLOP/s of the device, or None where it is not known (CPU, a GPU slice, an unlisted GPU)."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Peak dense bf16 FLOP/s by the name torch reports, such as "NVIDIA A100-SXM4-80GB"; None where not known."""
    if re.search(r"\bMIG\b", name):  # a slice of a GPU carries the name of the whole one
        return None
    found = [key for key in _PEAK_FLOPS if re.search(rf"\b{key}\b", name)]
    return _PEAK_FLOPS[max(found, key=len)] if found else None


def model_flops_per_token(active_params_non_embedding: int, num_layers: int, hidden: int, seq_len: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H S (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights a token is multiplied with: its top-k and shared experts but not the other experts, the
    output head but not the lookup of the input embedding. The attention term counts the full S x S square, as PaLM
    does for a causal model too; recomputation (activation checkpointing) is not counted. MFU = tokens per second *
    this / (peak FLOP/s * devices).
    """
    return 6.0 * active_params_non_embedding + 12.0 * num_layers * hidden * seq_len


class MetricsWriter:
    """Appends records to `metrics.jsonl` in a run folder and mirrors their numbers to Weights & Biases.

    Only one process of a run may hold a writer. wandb_mode: "auto" (online if the user is logged in, else offline),
    "offline" or "off". config: the resolved config, shown by Weights & Biases. resume: continue the file that is
    there.

    Raises ValueError for an unknown wandb_mode, and where the folder already holds metrics and resume is False.
    """

    def __init__(
        self,
        run_dir: Path | str,
        wandb_mode: str = "auto",
        wandb_project: str = "moe",
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        run_dir = Path(run_dir)
        path = run_dir / METRICS_FILE
        if not resume and path.exists() and path.stat().st_size > 0:
            raise ValueError(
                f"run folder {str(run_dir)!r} already holds {METRICS_FILE}: resume it, or give the run another name"
            )
        self._wandb = WandbMirror(run_dir, wandb_mode, wandb_project, to_plain(dict(config or {})), resume)
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_partial_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is in the operating system's hands when this returns. Non-finite numbers become null."""
        plain = to_plain(dict(record))
        self._file.write(json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        self._wandb.log(flatten(plain), plain.get("step"))

    def close(self, failed: bool = False) -> None:
        """Close the file and finish the Weights & Biases run. Safe to call twice."""
        self._file.close()
        self._wandb.finish(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def to_plain(value: Any) -> Any:
    """The value as strict JSON can hold it: tensors and arrays become numbers or lists, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # a tensor or a numpy value
        return to_plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return value


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers under flat names: `train/loss`, `layer/0/max_violation`, `layer/0/losses/switch`.

    Lists are left out (experts x layers names would bury the rest), and so are `step`, texts and missing values.
    """
    flat: dict[str, float] = {}

    def walk(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}/{key}", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                flat[f"{prefix}/{key}"] = value

    if record.get("kind") not in ("train", "eval"):
        return flat
    walk(str(record["kind"]), {key: value for key, value in record.items() if key not in ("kind", "step", "layers")})
    walk("layer", record.get("layers") or {})
    return flat


@dataclass(frozen=True)
class RunMetrics:
    """What `metrics.jsonl` says: records by kind, steps ascending and unique in `train` and `evals`.

    skipped_lines counts lines that were not valid records, such as one that a kill cut short.
    """

    run_dir: Path
    train: list[Record]
    evals: list[Record]
    events: list[Record]
    skipped_lines: int

    def layer_names(self) -> list[str]:
        """Names of the MoE layers that occur, in the order of the model."""
        names = {name for record in self.train for name in record.get("layers") or {}}
        return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def read_metrics(run_dir: Path | str) -> RunMetrics:
    """Read a run folder's metrics. Raises ValueError where the folder is not a run, naming what is missing.

    A step that occurs twice (the run was resumed from an earlier checkpoint) replaces that step and all the later
    ones written before it: they belong to weights that were thrown away.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(
            f"run folder {str(run_dir)!r} does not exist: give the folder that `moe train` wrote, runs/NAME"
        )
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ValueError(
            f"{str(run_dir)!r} is not a run folder, {METRICS_FILE} is missing: give the folder that `moe train` wrote"
        )
    train: list[Record] = []
    evals: list[Record] = []
    events: list[Record] = []
    skipped = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                skipped += bool(line.strip())
            elif record["kind"] == "event":
                events.append(record)
            elif record["kind"] == "eval":
                _rewind(evals, record["step"])
                evals.append(record)
            else:
                # An evaluation of step s comes after its training record, so a repeated step s makes that evaluation
                # stale too.
                if train and record["step"] <= train[-1]["step"]:
                    _rewind(evals, record["step"])
                _rewind(train, record["step"])
                train.append(record)
    return RunMetrics(run_dir, train, evals, events, skipped)


def _rewind(records: list[Record], step: int) -> None:
    while records and records[-1]["step"] >= step:
        records.pop()


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and record.get("kind") in ("train", "eval", "event")
    return record if known and isinstance(record.get("step"), int) else None


def _drop_partial_line(path: Path) -> None:
    """Cut off a last line without its newline, or the next record would be glued to it and lost as well."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = end = file.seek(0, 2)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
