"""The machines of a run: from a hostfile as DeepSpeed reads it, or from a list of names."""

import re
from dataclasses import dataclass
from pathlib import Path

# A name goes to ssh as one argument and must not read as an option; user@name and addresses are fine.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]*")
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine.

    Attributes:
        name: how ssh and the rendezvous reach it.
        slots: processes to run on it.
    """

    name: str
    slots: int

    @property
    def address(self) -> str:
        """Its name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of a file with lines ``NAME slots=N``; ``#`` begins a comment.

    Raises:
        ValueError: the file is missing, or a line, a name or a number is wrong; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"hostfile {str(path)!r} does not exist")
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}, line {number}: {text!r} must read NAME slots=N, such as node0 slots=8")
        hosts.append(Host(name=match["name"], slots=int(match["slots"])))
    return _checked(hosts, str(path))


def parse_nodes(text: str, slots: int) -> list[Host]:
    """Hosts of a list ``a,b,c`` with ``slots`` processes each; errors as in `read_hostfile`."""
    return _checked([Host(name=name.strip(), slots=slots) for name in text.split(",")], f"--nodes {text}")


def _checked(hosts: list[Host], where: str) -> list[Host]:
    if not hosts:
        raise ValueError(f"{where} names no host")
    for host in hosts:
        if not _NAME.fullmatch(host.name):
            raise ValueError(f"{where}: {host.name!r} is no host name; use letters, digits and . _ - @ :")
        if host.slots < 1:
            raise ValueError(f"{where}: {host.name} has slots={host.slots}; give it at least 1")
    names = [host.name for host in hosts]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{where} names {', '.join(sorted(repeated))} twice; give each host once, with all its slots")
    return hosts
