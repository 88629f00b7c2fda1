"""Two machines in one: network namespaces with a link between them, each with its own host name, address and sshd.

The namespaces have no names: they live as long as a process that holds them, which ends with this one, whatever ends it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.relay import DEVICE
from helpers.runs import TIMEOUT, clean_environment, descendants, is_running

SSHD_VARIABLE = "MOE_TEST_SSHD"  # an sshd outside of PATH
_PREFIX = "10.77.0"


# A command that dies with the process that started it.
_BOUND = ["setpriv", "--pdeathsig", "KILL"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine: held by process ``pid``; ``host`` as `gethostname` says there, its ``address`` on the link."""

    pid: int
    host: str
    address: str

    def inside(self, arguments: list[str]) -> list[str]:
        """A command that runs ``arguments`` on this machine."""
        return [*_BOUND, "nsenter", "--target", str(self.pid), "--net", "--uts", *arguments]

    def start(self, arguments: list[str], folder: Path, **environment: str) -> "Process":
        """Run a command on this machine in the background; its output goes to a file of ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        return Process(self.inside(arguments), folder / f"{self.host}.txt", environment)


class Process:
    """A command in the background, ended with everything it started by `kill`."""

    def __init__(self, command: list[str], out: Path, environment: dict[str, str]) -> None:
        self.out = out
        # gloo takes the address of this interface; a name would be looked up on the real machine
        variables = {**clean_environment(), "GLOO_SOCKET_IFNAME": DEVICE, **environment}
        with out.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    def end(self, timeout: float = TIMEOUT) -> int:
        """Its exit status; fails when it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL to it and to what it started, as when a machine loses its power."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            if is_running(pid):
                os.kill(pid, 9)
        self.process.wait()


def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]
    if missing or not sys.platform.startswith("linux"):
        return f"network namespaces need Linux with {', '.join(missing) or 'ip'}"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"network namespaces cannot be made here: {tried.stderr.strip()}"


@contextmanager
def two_nodes(delay_ms: float = 0.0, loss: float = 0.0, seed: int = 0) -> Iterator[tuple[list[Node], str]]:
    """Two machines and what joins them: "veth", or with a delay or loss "netem" where the kernel has it, else "relay"."""
    with ExitStack() as undo:
        nodes = [undo.enter_context(_node(index)) for index in range(2)]
        first, second = nodes
        kind = "veth"
        peer = ["peer", "name", DEVICE, "netns", str(second.pid)]
        _must(first, "ip", "link", "add", DEVICE, "type", "veth", *peer)
        if delay_ms or loss:
            kind = "netem" if all(_netem(node, delay_ms, loss) for node in nodes) else "relay"
        if kind == "relay":
            _must(first, "ip", "link", "del", DEVICE)
            undo.enter_context(_relay(nodes, delay_ms, loss, seed))
        for node in nodes:
            _must(node, "ip", "addr", "add", f"{node.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _must(node, "ip", "link", "set", device, "up")
        yield nodes, kind


@contextmanager
def _node(index: int) -> Iterator[Node]:
    host = f"node{index}"
    script = 'hostname "$0" && echo ready && exec sleep 3600'
    command = [*_BOUND, "unshare", "--net", "--uts", "sh", "-c", script, host]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n", f"{host} did not start"
        yield Node(pid=holder.pid, host=host, address=f"{_PREFIX}.{index + 1}")
    finally:
        holder.kill()
        holder.wait()


def _run(node: Node, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(node.inside([*command]), capture_output=True, text=True, timeout=30)


def _must(node: Node, *command: str) -> None:
    done = _run(node, *command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def cut(node: Node) -> None:
    """Take the machine's link down: packets vanish, connections stay open."""
    _must(node, "ip", "link", "set", DEVICE, "down")


def _netem(node: Node, delay_ms: float, loss: float) -> bool:
    qdisc = ["tc", "qdisc", "add", "dev", DEVICE, "root", "netem", "delay", f"{delay_ms}ms", "loss", f"{loss * 100}%"]
    return shutil.which("tc") is not None and _run(node, *qdisc).returncode == 0


@contextmanager
def _relay(nodes: list[Node], delay_ms: float, loss: float, seed: int) -> Iterator[None]:
    pids = [str(node.pid) for node in nodes]
    command = [*_BOUND, sys.executable, "-m", "helpers.relay", *pids, str(delay_ms), str(loss), str(seed)]
    relay = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout is not None and relay.stdout.readline() == "ready\n", "the relay did not start"
        yield
    finally:
        relay.kill()
        relay.wait()


# --- ssh


def find_sshd() -> str | None:
    """Path of an sshd: from `SSHD_VARIABLE`, or the system's."""
    named = os.environ.get(SSHD_VARIABLE)
    return named or shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def ssh_servers(nodes: list[Node], sshd: str, folder: Path) -> Iterator[Path]:
    """An sshd on every machine that lets a fresh key in; the config for ``ssh -F``."""
    folder.mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'user.pub'}\nPermitRootLogin yes\n"
        "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
    )
    config = folder / "ssh_config"
    config.write_text(
        f"Host {_PREFIX}.*\n  User root\n  IdentityFile {folder / 'user'}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder / 'known_hosts'}\n  StrictHostKeyChecking accept-new\n"
    )
    # sshd wants a user and an empty folder to lock itself into; in a mount namespace they are there for it alone.
    users = folder / "passwd"
    users.write_text(Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
    private = 'mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd && mount --bind "$0" /etc/passwd && exec "$@"'
    with ExitStack() as undo:
        for node in nodes:
            isolated = ["unshare", "--mount", "sh", "-c", private, str(users)]
            server = node.start([*isolated, sshd, "-D", "-e", "-f", str(folder / "sshd_config")], folder)
            undo.callback(server.kill)
            _wait_until_listening(node, server)
        yield config


def _wait_until_listening(node: Node, server: Process) -> None:
    deadline = time.monotonic() + 30
    while "Server listening" not in server.output:
        assert server.process.poll() is None and time.monotonic() < deadline, f"no sshd on {node.host}: {server.output}"
        time.sleep(0.05)
