"""`moe doctor`: what this machine has, what will be used, and a live check of every router and of expert parallelism."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.launch.env import num_gpus
from moe.launch.local import run_local
from moe.train.run_folder import device_name, package_versions

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5


def examine() -> dict[str, Any]:
    """Everything `moe doctor` shows, as plain data; ``ok`` says whether the live checks passed."""
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
    with _with_checks():
        findings["routers"] = _check_routers("cuda" if gpus else "cpu")
        findings["expert_parallel"] = _check_expert_parallel("cuda" if gpus > 1 else "cpu")
    findings["ok"] = findings["routers"]["ok"] and findings["expert_parallel"].get("ok", False)
    return findings


@contextmanager
def _with_checks() -> Iterator[None]:
    """MOE_CHECK=1 in this process and those it starts: layers then look at their input and their routing."""
    before = os.environ.get("MOE_CHECK")
    os.environ["MOE_CHECK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOE_CHECK"]
        else:
            os.environ["MOE_CHECK"] = before


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


def _check_routers(device_type: str) -> dict[str, Any]:
    """Run a small layer with every router at its defaults; what went wrong, by name."""
    import torch

    from moe.routers import ROUTERS

    failures = {}
    for name in ROUTERS:
        torch.manual_seed(0)
        try:
            run_router(name, torch.randn(4, 8, 32, device=device_type))
        except Exception as problem:  # whatever it is, the other routers are still worth a look
            failures[name] = f"{type(problem).__name__}: {problem}"
    return {"ok": not failures, "checked": list(ROUTERS), "failures": failures}


def run_router(name: str, x_BLD: "torch.Tensor") -> None:
    """Forward, backward, the end of a step, and evaluation of a layer with this router; an error if anything is not finite."""
    import torch

    from moe.layer import MoELayer, MoESpec

    batch, length, dim = x_BLD.shape
    layer = MoELayer(dim, MoESpec(num_experts=8, expert_hidden=16, router={"name": name})).to(x_BLD.device)
    layer.context.input_ids_T = torch.arange(batch * length, device=x_BLD.device)
    x_BLD = x_BLD.detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups that are small here
        y_BLD = layer(x_BLD)
        y_BLD.square().sum().backward()
        layer.finish_step()
        evaluated_BLD = layer.eval()(x_BLD)
    found = {"output": y_BLD, "output in evaluation": evaluated_BLD, "gradient of the input": x_BLD.grad}
    found |= {f"gradient of {key}": parameter.grad for key, parameter in layer.named_parameters()}
    for what, tensor in found.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"the {what} is not finite")


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
    routers = findings["routers"]
    verdict = "; ".join(f"{name}: {problem}" for name, problem in routers["failures"].items())
    table.add_row(
        "routers", f"FAILED: {verdict}" if verdict else f"ok: {len(routers['checked'])}, forward and backward"
    )
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
