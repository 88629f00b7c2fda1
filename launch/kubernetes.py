"""The Kubernetes manifest of a job: launch/kubernetes.yaml with names, numbers and arguments filled in."""

import re
from pathlib import Path
from typing import Any

import yaml

from moe.launch.plans import Job

TEMPLATE = Path(__file__).resolve().parent / "kubernetes.yaml"
_LONGEST_NAME = 40  # pod names append to it, and a DNS label has 63 characters


def manifest(job: Job, device: str = "auto") -> dict[str, Any]:
    """The JobSet as plain data; hosts count, their names do not: Kubernetes chooses the machines.

    Args:
        job: the run.
        device: parallel.device of its config; for "cpu" no GPUs are asked for.

    Raises:
        ValueError: the machines have unequal slots, which pods of one Job cannot.
    """
    slots = {host.slots for host in job.hosts}
    if len(slots) > 1:
        raise ValueError(f"--launcher kubernetes makes all pods alike, and the hosts have slots {sorted(slots)}")
    (num_processes,), num_nodes = slots, len(job.hosts)
    name = _dns_label(job.name)
    values: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    values["metadata"]["name"] = name
    (replicated,) = values["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    spec["parallelism"] = spec["completions"] = num_nodes
    (container,) = spec["template"]["spec"]["containers"]
    container["image"] = job.image
    nodes = f"{job.min_nodes}:{num_nodes}" if job.min_nodes < num_nodes else str(num_nodes)
    # Pods that Kubernetes starts again run the same command: they must find the run.
    resume = [] if "--resume" in job.arguments else ["--resume"]
    container["args"] = [
        f"--nnodes={nodes}",
        f"--nproc-per-node={num_processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={name}-{replicated['name']}-0-0.{name}:{job.port}",
        f"--rdzv-id={name}",
        f"--max-restarts={job.max_restarts}",
        "-m",
        "moe.launch.train",
        *(argument.replace("$(", "$$(") for argument in job.arguments),  # $(NAME) would be expanded
        *resume,
    ]
    container["ports"][0]["containerPort"] = job.port
    container["env"] += [{"name": key, "value": value} for key, value in job.environment.items()]
    container["resources"]["limits"] = {} if device == "cpu" else {"nvidia.com/gpu": num_processes}
    return values


def render(values: dict[str, Any]) -> str:
    """The manifest as YAML."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _dns_label(name: str) -> str:
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return label or "moe"
