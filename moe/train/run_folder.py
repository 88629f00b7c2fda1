"""The folder of a run: what it holds, when it may be written to, and the record of what produced it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from moe.train.config import RunConfig
from moe.train.metrics import METRICS_FILE

CONFIG_FILE, ENVIRONMENT_FILE, SUMMARY_FILE = "config.yaml", "environment.json", "summary.json"
CHECKPOINTS_DIR, MODEL_DIR = "checkpoints", "model"

_PACKAGES = (
    "moe-framework",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
)


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ValueError: the folder holds a run already and ``resume`` is not set.
    """
    if not resume and any((run_dir / name).exists() for name in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS_DIR)):
        raise ValueError(
            f"run folder {str(run_dir)!r} already holds a run; add --resume to continue it, or choose another name=..."
        )


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter to results, where they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the source that is running, with "-dirty" if it was changed; None outside a git checkout."""
    root = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_run_files(run_dir: Path, config: RunConfig, environment: dict[str, Any]) -> None:
    """Write the resolved config and the environment."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
    record = {
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "num_cpus": os.cpu_count(),
        **environment,
    }
    (run_dir / ENVIRONMENT_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
