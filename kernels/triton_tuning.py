"""Block sizes of the Triton kernels: one table, chosen by what the shapes are like and never by the exact token count.

A card that blocks were tuned on has a file in ``tuned/``, written by ``benchmarks/run.py tune-kernels`` with the time of each
choice; other cards take the sizes below, with fewer stages where their shared memory holds fewer. Keys are the kernel, how many
rows an expert has on average (`ROWS`), and the width of the dtype. So a step with other tokens runs the kernels that are compiled
already.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TUNED_DIR = Path(__file__).parent / "tuned"
ROWS = {"many": 96, "some": 32, "few": 0}  # least rows per expert
# Of a program, by compute capability (CUDA programming guide, "technical specifications"); all others have 99.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one kernel is cut.

    Attributes:
        m, n, k: block sizes; m are rows (for "weight" the rows of the gradient), k the reduced dimension.
        group: row tiles that run together to share weights in the L2 cache.
        warps, stages: warps per program, depth of the software pipeline.
        per_sm: programs per multiprocessor of a persistent grid; 0 gives each tile a program.
        tma: load weights through the tensor memory accelerator where the card and the shapes allow it.
    """

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    per_sm: int = 0
    tma: bool = True

    def meta(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Not measured: sizes that fit Hopper's registers and shared memory without spills (checked by compiling for it).
_HALF = {
    ("up", "many"): Blocks(m=128, n=128, k=64, stages=3),
    ("up", "some"): Blocks(m=64, n=128, k=64, warps=8, stages=3),
    ("up", "few"): Blocks(m=16, n=128, k=128, warps=4, stages=3),
    ("rows", "many"): Blocks(m=128, n=256, k=64, stages=3),
    ("rows", "some"): Blocks(m=64, n=256, k=64, warps=8, stages=3),
    ("rows", "few"): Blocks(m=16, n=128, k=128, warps=4, stages=4),
    ("activation", "many"): Blocks(m=128, n=128, k=64, stages=3),
    ("activation", "some"): Blocks(m=64, n=128, k=64, warps=8, stages=3),
    ("activation", "few"): Blocks(m=16, n=128, k=128, warps=4, stages=3),
    ("weight", "many"): Blocks(m=128, n=256, k=64, stages=3),
    ("weight", "some"): Blocks(m=128, n=128, k=32, warps=8, stages=3),
    ("weight", "few"): Blocks(m=128, n=128, k=16, warps=8, stages=3),
}
_FULL = {
    (kernel, rows): Blocks(m=16 if rows == "few" else 64, n=64, k=32, warps=4, stages=3)
    for kernel in ("up", "rows", "activation", "weight")
    for rows in ("many", "some", "few")
}


def rows_class(num_rows: int, num_experts: int) -> str:
    """The name in `ROWS` that ``num_rows`` rows over ``num_experts`` experts have."""
    mean = num_rows / max(num_experts, 1)
    return next(name for name, least in ROWS.items() if mean >= least)


def blocks_for(kernel: str, num_rows: int, num_experts: int, dtype: torch.dtype) -> Blocks:
    """Block sizes of ``kernel`` ("up", "rows", "activation", "weight") for ``num_rows`` rows over ``num_experts`` experts."""
    rows = rows_class(num_rows, num_experts)
    if dtype.itemsize > 2:
        return _fitted(kernel, _FULL[kernel, rows], dtype)
    return _tuned(_device_name()).get((kernel, rows)) or _fitted(kernel, _HALF[kernel, rows], dtype)


def _fitted(kernel: str, blocks: Blocks, dtype: torch.dtype) -> Blocks:
    """With as many stages as the card's shared memory holds; the tables are made for Hopper's."""
    most = _SHARED_KIB.get(_capability(), 99) * 1024
    stage = blocks.k * (blocks.m + blocks.n * (2 if kernel == "up" else 1)) * dtype.itemsize
    # Without warp-group instructions one stage of the pipeline is in registers.
    return blocks if most >= 227 * 1024 else replace(blocks, stages=min(blocks.stages, most // stage + 1))


def tuned_file(device_name: str) -> Path:
    """Where the blocks tuned on a card of that name are."""
    return TUNED_DIR / f"{device_name.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


@functools.cache
def _device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@functools.cache
def _tuned(device_name: str | None) -> dict[tuple[str, str], Blocks]:
    """For 16-bit dtypes on that card; empty where nothing was tuned."""
    if device_name is None or not (path := tuned_file(device_name)).is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["blocks"]
    return {(entry["kernel"], entry["rows"]): Blocks(**entry["sizes"]) for entry in entries}
