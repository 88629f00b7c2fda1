"""Scaling laws of MoE models: published ones, compute-optimal sizes, and fits to one's own runs."""

from pathlib import Path

from moe.errors import nearest
from moe.scaling.laws.fine_grained import FINE_GRAINED, FINE_GRAINED_16, FINE_GRAINED_DENSE
from moe.scaling.laws.joint import JOINT
from moe.scaling.laws.law import Law
from moe.scaling.laws.own import load_law
from moe.scaling.laws.size import ModelSize

LAWS: dict[str, Law] = {law.name: law for law in (JOINT, FINE_GRAINED, FINE_GRAINED_16, FINE_GRAINED_DENSE)}

__all__ = ["LAWS", "Law", "ModelSize", "find_law"]


def find_law(name: str) -> Law:
    """A published law by its name, or one's own by its file.

    Raises:
        ValueError: there is none of that name.
    """
    if name in LAWS:
        return LAWS[name]
    if Path(name).is_file():
        return load_law(Path(name))
    raise ValueError(f"--law {name!r} is no file and no published law; {nearest(name, LAWS)}")
