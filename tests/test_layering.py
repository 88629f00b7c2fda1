"""Imports go down the layers, never up; and only few places talk to other ranks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Low to high; modules of one layer may import each other. A new module of `moe` needs a place here.
LAYERS = (
    ("types", "errors"),
    ("kernels",),
    ("routers", "experts", "quantized_module", "quantized_experts", "layer", "observe"),
    ("parallel",),
    ("models", "convert", "scaling", "quant"),
    ("train",),
    ("cli", "commands", "launch", "__main__", "configs"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
COMMUNICATION = ("torch.distributed", "deepspeed.comm")
MAY_COMMUNICATE = ("parallel", "launch")


def modules() -> dict[str, Path]:
    """Every module of the product by its import name."""
    found = {}
    for folder, prefix in (("moe", "moe"), ("kernels", "moe.kernels"), ("launch", "moe.launch")):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "moe" and inside[0] in ("kernels", "launch", "configs"):
                continue  # links to what is walked by itself
            found[".".join((prefix, *inside)).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of attribute chains such as ``torch.distributed.get_rank``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def owner(module: str) -> str:
    """The part of `moe` that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of ``module`` that go up, or to a part that has no layer."""
    wrong = []
    for line, name in imported(ast.parse(source)):
        if name.split(".")[0] == "moe" and owner(name) in RANK and RANK[owner(name)] > RANK[owner(module)]:
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def communication(module: str, source: str) -> list[str]:
    """Uses of other ranks in a module that must not know them."""
    if owner(module) in MAY_COMMUNICATE:
        return []
    tree = ast.parse(source)
    return [
        f"{module}:{line} uses {name}"
        for line, name in (*imported(tree), *used(tree))
        if any(name == known or name.startswith(f"{known}.") for known in COMMUNICATION)
    ]


def test_every_module_has_a_layer() -> None:
    found = {owner(module) for module in modules()} - {""}
    assert found <= RANK.keys(), f"say in LAYERS where {sorted(found - RANK.keys())} belong"
    assert {"types", "kernels", "routers", "layer"} <= found


@pytest.mark.parametrize("module", [name for name in modules() if name != "moe"])
def test_imports_go_down_and_only_parallel_talks(module: str) -> None:
    source = modules()[module].read_text()
    assert upward_imports(module, source) == []
    assert communication(module, source) == []


def test_the_walk_sees_what_is_forbidden() -> None:
    assert upward_imports("moe.kernels.ops", "def f():\n    from moe.layer import MoELayer\n")
    assert upward_imports("moe.routers.topk", "from moe import models")
    assert upward_imports("moe.types", "import moe.kernels.ops")
    assert not upward_imports("moe.layer", "from moe.types import Routing\nfrom moe import __version__\nimport moe")
    assert communication("moe.layer", "import torch.distributed as dist")
    assert communication("moe.layer", "from torch import distributed")
    assert communication("moe.layer", "import torch\ntorch.distributed.barrier()")
    assert communication("moe.train.trainer", "from torch.distributed.tensor import DTensor")
    assert communication("moe.train.trainer", "from deepspeed import comm")
    assert not communication("moe.parallel.mesh", "import torch.distributed as dist")
    assert not communication("moe.layer", "from torch.distributions import Normal")
    with pytest.raises(AssertionError, match="relative"):
        upward_imports("moe.layer", "from . import types")
