"""`moe launch`: from a config and a list of machines to a plan, printed or run."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe.errors import nearest
from moe.launch import kubernetes
from moe.launch.hosts import Host, parse_nodes, read_hostfile
from moe.launch.many import command_of_this_machine, run_all, run_here
from moe.launch.plans import PLANS, Command, Job, check_tools
from moe.train.config import RunConfig, load_config

KUBERNETES = "kubernetes"


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What `moe launch` was asked for; see its --help."""

    launcher: str
    nodes: str | None
    hostfile: Path | None
    min_nodes: int | None
    port: int
    environment: list[str]
    ssh_config: Path | None
    this_host: str | None
    image: str
    dry_run: bool


def launch_job(config_path: Path, overrides: list[str], resume: bool, options: LaunchOptions) -> int:
    """Print the plan, or run it; returns the exit status.

    Raises:
        ValueError: the config, a host, or an option is wrong.
    """
    known = [*PLANS, KUBERNETES]
    if options.launcher not in known:
        raise ValueError(f"--launcher {options.launcher!r} is unknown; {nearest(options.launcher, known)}")
    config = load_config(config_path, overrides)
    arguments = [str(config_path), *overrides, *(["--resume"] if resume else [])]
    job = make_job(config, arguments, options)
    if options.launcher == KUBERNETES:
        print(kubernetes.render(kubernetes.manifest(job, config.parallel.device)), end="")
        return 0
    commands = PLANS[options.launcher](job)
    if options.dry_run:
        for command in commands:
            print(f"{command.host}: {command.shell()}")
        return 0
    check_tools(options.launcher)
    return _RUNNERS[options.launcher](commands, job, options)


def make_job(config: RunConfig, arguments: list[str], options: LaunchOptions) -> Job:
    """A checked job: also with the fewest machines that it may go on with, the batch divides over the ranks."""
    hosts = _hosts(config, options)
    min_nodes = len(hosts) if options.min_nodes is None else options.min_nodes
    if min_nodes > len(hosts):
        raise ValueError(f"--min-nodes {min_nodes} is more than the {len(hosts)} hosts; lower it")
    world_size = sum(host.slots for host in hosts)
    if world_size % config.parallel.ep_size:
        raise ValueError(
            f"parallel.ep_size={config.parallel.ep_size} does not divide the {world_size} processes of all hosts; change it "
            "or the slots"
        )
    config.grad_accum(world_size)
    return Job(
        name=config.name,
        hosts=hosts,
        arguments=arguments,
        directory=Path.cwd(),
        port=options.port,
        max_restarts=config.parallel.max_restarts,
        min_nodes=min_nodes,
        environment=dict(_variable(text) for text in options.environment),
        hostfile=options.hostfile,
        ssh_config=options.ssh_config,
        image=options.image,
    )


def _hosts(config: RunConfig, options: LaunchOptions) -> list[Host]:
    if (options.nodes is None) == (options.hostfile is None):
        raise ValueError("give the machines either as --nodes a,b,c or as --hostfile FILE")
    if options.hostfile is not None:
        return read_hostfile(options.hostfile)
    processes = config.parallel.processes
    if processes == "auto":
        raise ValueError(
            "parallel.processes=auto counts the GPUs of this machine, not those of --nodes; set it to the processes on each "
            "machine, or give --hostfile with slots"
        )
    assert options.nodes is not None
    if options.launcher == KUBERNETES and options.nodes.isdecimal():
        return [Host(name=f"node{index}", slots=processes) for index in range(int(options.nodes))]
    return parse_nodes(options.nodes, processes)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"--env {shlex.quote(text)} must read NAME=VALUE")
    return name, value


def _run_here(commands: list[Command], job: Job, options: LaunchOptions) -> int:
    return run_here(command_of_this_machine(commands, job.hosts, options.this_host))


def _run_only(commands: list[Command], job: Job, options: LaunchOptions) -> int:
    (command,) = commands
    return run_here(command)


def _run_all(commands: list[Command], job: Job, options: LaunchOptions) -> int:
    return run_all(commands, job.min_nodes)


_RUNNERS: dict[str, Callable[[list[Command], Job, LaunchOptions], int]] = {
    "torchrun": _run_here,
    "ssh": _run_all,
    "deepspeed": _run_only,
    "slurm": _run_only,
}
