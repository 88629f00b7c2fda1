"""`moe doctor`: what this machine has, what will be used, and a live check of expert parallelism."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe.launch.env import num_gpus
from moe.launch.local import run_local
from moe.train.run_folder import device_name, package_versions

TOLERANCE = 1e-5


def examine() -> dict[str, Any]:
    """Everything `moe doctor` shows, as plain data; ``ok`` says whether the live check passed."""
    import torch

    from moe.kernels import ops

    gpus = num_gpus()
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(gpus)],
        "driver": _driver() if gpus else None,
        "kernels": ops.chosen(),
        "collectives": "nccl" if gpus > 1 else "gloo",
    }
    findings["expert_parallel"] = _check_expert_parallel("cuda" if gpus > 1 else "cpu")
    findings["ok"] = findings["expert_parallel"].get("ok", False)
    return findings


def _driver() -> str | None:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip()


def _check_expert_parallel(device_type: str) -> dict[str, Any]:
    """Compare 2 ranks with expert parallelism 2 to one process, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        status = run_local([device_type, str(out)], 2, module="moe.launch.selfcheck")
        if status or not out.is_file():
            return {"ok": False, "error": f"the check ended with status {status}; its output is above"}
        errors: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    worst = max(errors.values())
    return {"ok": worst <= TOLERANCE, "device": device_type, "tolerance": TOLERANCE, "relative_errors": errors}


def render(findings: dict[str, Any]) -> None:
    """Print findings as a table to stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    packages = ", ".join(f"{name} {version}" for name, version in findings["packages"].items())
    rows = {
        "python": f"{findings['python']} on {findings['platform']}",
        "packages": packages,
        "cpu": f"{findings['cpu']}, {findings['cpu_threads']} threads, {findings['cpu_capability']}",
        "gpus": ", ".join(findings["gpus"]) or "none",
        "kernels": f"{findings['kernels']} (MOE_KERNELS={os.environ.get('MOE_KERNELS', 'unset')})",
        "collectives": findings["collectives"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    check = findings["expert_parallel"]
    if "relative_errors" in check:
        worst = max(check["relative_errors"].items(), key=lambda item: item[1])
        verdict = "ok" if check["ok"] else "WRONG"
        table.add_row(
            "expert parallel",
            f"{verdict}: output and {len(check['relative_errors']) - 1} gradients of 2 ranks against 1 process, "
            f"largest relative error {worst[1]:.1e} ({worst[0]}), limit {check['tolerance']:.0e}",
        )
    else:
        table.add_row("expert parallel", f"FAILED: {check['error']}")
    Console(file=sys.stderr).print(table)
