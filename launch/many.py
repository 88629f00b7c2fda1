"""Runs the commands of a plan from this machine, passes a request to stop on to all, and stops the rest when too few are left."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from moe.launch.hosts import Host
from moe.launch.local import GRACE_SECONDS
from moe.launch.plans import Command


def run_here(command: Command) -> int:
    """Become the command; returns only where that fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def command_of_this_machine(commands: list[Command], hosts: list[Host], this_host: str | None) -> Command:
    """The command whose host is this machine: by ``this_host``, or by the names and addresses that it has.

    Raises:
        ValueError: none or several fit.
    """
    own = _own_names() if this_host is None else {this_host}
    matching = [
        command
        for command, host in zip(commands, hosts, strict=True)
        if own & {host.name, host.address, _address(host)}
    ]
    if len(matching) != 1:
        names = ", ".join(host.name for host in hosts)
        raise ValueError(
            f"this machine ({this_host or socket.gethostname()}) is {'none' if not matching else 'several'} of the hosts "
            f"{names}; say which with --this-host"
        )
    return matching[0]


def _own_names() -> set[str]:
    names = {socket.gethostname(), socket.getfqdn()}
    return names | {name.partition(".")[0] for name in names} | {ip for ip in map(_resolve, names) if ip is not None}


def _address(host: Host) -> str:
    address = _resolve(host.address)
    # Every machine has a loopback address: it tells nothing, and some map their own name to it.
    return host.address if address is None or address.startswith("127.") else address


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def run_all(commands: list[Command], min_nodes: int) -> int:
    """Run one command per machine at the same time, each with its input held open (`moe.launch.remote`).

    When fewer than ``min_nodes`` are running or have ended well, the others are asked to stop by closing their input; so
    they are on SIGTERM and SIGINT. What is left after `GRACE_SECONDS` is killed here; there, the closed connection ends it.

    Returns:
        0 if at least ``min_nodes`` ended with 0, else the first status that was not.
    """
    running: list[subprocess.Popen[bytes]] = []
    asked_at: list[float] = []

    def ask(number: int = 0, frame: FrameType | None = None) -> None:
        asked_at.append(time.monotonic())
        for process in running:
            if process.stdin is not None:
                process.stdin.close()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for command in commands:
            environment = {**os.environ, **command.environment}
            # In a session of its own: Ctrl-C is for this process, which passes it on.
            process = subprocess.Popen(
                command.arguments, env=environment, stdin=subprocess.PIPE, start_new_session=True
            )
            running.append(process)
        failures: dict[str, int] = {}
        while any(process.poll() is None for process in running):
            for command, process in zip(commands, running, strict=True):
                if process.poll() and command.host not in failures:
                    failures[command.host] = _status(process)
                    print(f"{command.host} ended with status {failures[command.host]}", file=sys.stderr)
            if len(running) - len(failures) < min_nodes and not asked_at:
                ask()
            if asked_at and time.monotonic() - asked_at[0] > GRACE_SECONDS:
                for process in running:
                    process.kill()
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    if sum(process.returncode == 0 for process in running) >= min_nodes:
        return 0
    return next(iter(failures.values()), 0) or next(_status(process) for process in running if process.returncode)


def _status(process: "subprocess.Popen[bytes]") -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
