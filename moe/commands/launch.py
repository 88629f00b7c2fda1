"""`moe launch`."""

from pathlib import Path
from typing import Annotated

import typer


def launch(
    config: Annotated[Path, typer.Argument(help="YAML recipe, such as configs/multi-node.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    nodes: Annotated[str | None, typer.Option(help="Machines as a,b,c; parallel.processes ranks on each.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="File with lines NAME slots=N.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun, ssh, deepspeed, slurm or kubernetes.")] = "ssh",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in its folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run where, and run nothing.")] = False,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Machines that are enough to go on.")] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Free on the first machine; the ranks meet there.")
    ] = 29500,
    environment: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for every process.")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="For ssh -F: users, keys, ports.")] = None,
    this_host: Annotated[str | None, typer.Option(help="Which of the hosts this machine is, for torchrun.")] = None,
    image: Annotated[str, typer.Option(help="Container image, for kubernetes.")] = "moe-framework:latest",
) -> None:
    """Train on several machines.

    `ssh` and `deepspeed` start all machines from here; `torchrun` runs this machine's part, to be repeated on each; `slurm`
    submits a job; `kubernetes` prints a manifest. Machines share the folder they run in.

    Example: `moe launch configs/multi-node.yaml --nodes node0,node1 --dry-run`
    """
    from moe.launch.commands import LaunchOptions, launch_job

    options = LaunchOptions(
        launcher=launcher,
        nodes=nodes,
        hostfile=hostfile,
        min_nodes=min_nodes,
        port=port,
        environment=environment or [],
        ssh_config=ssh_config,
        this_host=this_host,
        image=image,
        dry_run=dry_run,
    )
    if status := launch_job(config, overrides or [], resume, options):
        raise typer.Exit(status)
