"""What `moe launch` would run, and where: one plan per launcher, as plain commands.

Every launcher ends at ``python -m moe.launch.train CONFIG ...`` on each machine, with the same arguments. The commands are lists:
what the user typed becomes shell text in one place only, `Command.shell`, quoted.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moe.launch.hosts import Host

ON_THIS_MACHINE = "this machine"
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run over several machines.

    Attributes:
        name: of the run.
        hosts: the machines; the first is where the ranks meet.
        arguments: for `moe.launch.train`: config, overrides, --resume.
        directory: where the commands run, on every machine.
        port: on the first machine, free there.
        max_restarts: how often torchrun starts all ranks again after losing one.
        min_nodes: machines that are enough to go on; fewer than ``hosts`` makes the run elastic.
        environment: variables for every process.
        hostfile: where the hosts were read from.
        ssh_config: for ``ssh -F``.
        python: the interpreter on every machine.
        image: the container of the Kubernetes manifest.
    """

    name: str
    hosts: list[Host]
    arguments: list[str]
    directory: Path
    port: int = 29500
    max_restarts: int = 0
    min_nodes: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    hostfile: Path | None = None
    ssh_config: Path | None = None
    python: str = sys.executable
    image: str = "moe-framework:latest"

    @property
    def is_elastic(self) -> bool:
        """Whether ranks may be started again, or on fewer machines."""
        return self.max_restarts > 0 or self.min_nodes < len(self.hosts)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command on one machine.

    Attributes:
        host: the machine's name, or `ON_THIS_MACHINE`.
        arguments: the command, not for a shell.
        environment: variables beyond those of the shell it starts from.
    """

    host: str
    arguments: list[str]
    environment: dict[str, str]

    def shell(self) -> str:
        """As a line for a POSIX shell, every word quoted."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *variables] if variables else []), *self.arguments])


def torchrun(job: Job) -> list[Command]:
    """One torchrun per machine: static ranks, or a c10d rendezvous that survives lost ranks and machines."""
    head = f"{job.hosts[0].address}:{job.port}"
    commands = []
    for index, host in enumerate(job.hosts):
        if job.is_elastic:
            nodes = f"{job.min_nodes}:{len(job.hosts)}" if job.min_nodes < len(job.hosts) else str(len(job.hosts))
            # Ranks that start again must find the run: the first start finds none and begins it.
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", head, "--rdzv-id", job.name]
            meet += ["--rdzv-conf", f"is_host={int(index == 0)}", "--local-addr", host.address]
            meet += ["--max-restarts", str(job.max_restarts)]
        else:
            nodes = str(len(job.hosts))
            meet = ["--node-rank", str(index), "--master-addr", job.hosts[0].address, "--master-port", str(job.port)]
        launcher = [job.python, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(host.slots)]
        arguments = [*launcher, *meet, "-m", "moe.launch.train", *_train_arguments(job)]
        commands.append(Command(host=host.name, arguments=arguments, environment=job.environment))
    return commands


def _train_arguments(job: Job) -> list[str]:
    resume = ["--resume"] if job.is_elastic and "--resume" not in job.arguments else []
    return [*job.arguments, *resume]


def ssh(job: Job) -> list[Command]:
    """The same torchrun commands, each started from here by ssh."""
    options = ["-o", "BatchMode=yes", *(["-F", str(job.ssh_config)] if job.ssh_config is not None else [])]
    commands = []
    for command in torchrun(job):
        followed = Command(
            host=command.host,
            arguments=[job.python, "-m", "moe.launch.remote", *command.arguments],
            environment=command.environment,
        )
        remote = f"cd {shlex.quote(str(job.directory))} && exec {followed.shell()}"
        arguments = ["ssh", *options, "--", command.host, remote]
        commands.append(Command(host=command.host, arguments=arguments, environment={}))
    return commands


def deepspeed(job: Job) -> list[Command]:
    """DeepSpeed's launcher, which reaches the machines of the hostfile by pdsh over ssh."""
    if job.hostfile is None:
        raise ValueError("--launcher deepspeed reads the machines from a file; give --hostfile instead of --nodes")
    if job.is_elastic:
        raise ValueError(
            "--launcher deepspeed cannot start ranks again; use --launcher ssh or torchrun, or set parallel.max_restarts=0 "
            "and leave --min-nodes away"
        )
    if job.environment:
        raise ValueError("--launcher deepspeed passes no --env on; write NAME=VALUE lines into .deepspeed_env instead")
    for argument in job.arguments:
        if not _PLAIN.fullmatch(argument):  # it joins them to a line for the shells over there, quoting only some
            raise ValueError(
                f"--launcher deepspeed cannot pass {argument!r} on; write the setting into the config file"
            )
    environment = {}
    if job.ssh_config is not None:
        environment["PDSH_SSH_ARGS_APPEND"] = f"-F {shlex.quote(str(job.ssh_config))}"
    launcher = [job.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(job.hostfile)]
    if job.ssh_config is not None:
        launcher.append("--no_ssh_check")  # its trial connection knows nothing of the config
    meet = ["--master_addr", job.hosts[0].address, "--master_port", str(job.port)]
    arguments = [*launcher, *meet, "--module", "moe.launch.train", *job.arguments]
    return [Command(host=ON_THIS_MACHINE, arguments=arguments, environment=environment)]


def slurm(job: Job) -> list[Command]:
    """``sbatch`` of launch/train.slurm, which runs one torchrun per machine."""
    slots = {host.slots for host in job.hosts}
    if len(slots) > 1:
        raise ValueError(f"--launcher slurm gives every machine as many processes, and the hosts have {sorted(slots)}")
    script = Path(__file__).resolve().parent / "train.slurm"
    nodes = ["--nodes", str(len(job.hosts)), "--nodelist", ",".join(host.address for host in job.hosts)]
    variables = {**job.environment, "PROCESSES": str(slots.pop()), "PORT": str(job.port)}
    variables |= {"MAX_RESTARTS": str(job.max_restarts), "MIN_NODES": str(job.min_nodes)}
    variables["SCRIPTS"] = str(script.parent)
    names = ",".join(["ALL", *variables])
    arguments = ["sbatch", *nodes, "--job-name", job.name, "--export", names, str(script), *job.arguments]
    return [Command(host=ON_THIS_MACHINE, arguments=arguments, environment=variables)]


PLANS: dict[str, Callable[[Job], list[Command]]] = {
    "torchrun": torchrun,
    "ssh": ssh,
    "deepspeed": deepspeed,
    "slurm": slurm,
}
_NEEDS = {"deepspeed": ("pdsh", "install pdsh, or use --launcher ssh"), "slurm": ("sbatch", "run it where Slurm is")}


def check_tools(launcher: str) -> None:
    """Whether the program that the launcher calls is on this machine.

    Raises:
        ValueError: it is not; the message says what to do.
    """
    program, advice = _NEEDS.get(launcher, ("", ""))
    if program and shutil.which(program) is None:
        raise ValueError(f"--launcher {launcher} needs {program}, which is not on PATH; {advice}")
