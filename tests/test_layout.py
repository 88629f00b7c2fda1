"""The top level: one import root, and nothing of ours that shadows the Hugging Face package `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe
from moe.kernels import ops

ROOT = Path(__file__).parents[1]


def test_kernels_is_no_package_of_its_own() -> None:
    assert (ROOT / "kernels" / "ops.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "launch", "configs"])
def test_top_level_folders_are_reached_through_relative_links(name: str) -> None:
    link = ROOT / "moe" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["kernels", "launch", "configs"])
def test_no_import_root_but_moe(name: str) -> None:
    """Neither where pytest runs nor as installed does a bare import find a module of ours."""
    script = f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec.origin if spec else None)"
    for flags, folder in (([], ROOT), (["-I"], ROOT.parent)):
        done = subprocess.run(
            [sys.executable, *flags, "-c", script], capture_output=True, text=True, cwd=folder, timeout=60, check=True
        )
        origin = done.stdout.strip()
        assert origin == "None" or not Path(origin).resolve().is_relative_to(ROOT) or "site-packages" in origin


def test_moe_comes_from_here() -> None:
    assert Path(moe.__file__).resolve() == ROOT / "moe" / "__init__.py"
    assert ops.__name__ == "moe.kernels.ops"
    assert Path(ops.__file__).resolve() == ROOT / "kernels" / "ops.py"
