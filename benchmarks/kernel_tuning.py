"""``tune-kernels``: block sizes of the expert FFN's Triton kernels, tried one by one on the GPU at hand.

Each kernel is timed alone on Qwen3-30B-A3B's layer (D = 2048, F = 768, E = 128) in bf16, for each class of rows per expert. The
best go into ``kernels/tuned/CARD.json`` with their times, and every try is a row, so that the choice can be looked up. A size
that does not fit the card is a row without a time.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice, product
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.spec import Benchmark, Check, Options, Row
from moe.kernels import triton_ops
from moe.kernels.triton_plan import make_plan
from moe.kernels.triton_tuning import Blocks, blocks_for, tuned_file

DIM, HIDDEN, NUM_EXPERTS = 2048, 768, 128
ROWS_PER_EXPERT = {"many": 2048, "some": 64, "few": 4}
KERNELS = ("up", "rows", "activation", "weight")
BUDGET_S = 420.0
_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "many": {"m": (64, 128), "n": (128, 256), "k": (32, 64), "warps": (4, 8), "stages": (3, 4)},
    "some": {"m": (32, 64), "n": (64, 128, 256), "k": (64, 128), "warps": (4, 8), "stages": (3, 4)},
    "few": {"m": (16,), "n": (64, 128), "k": (64, 128), "warps": (4, 8), "stages": (3, 4, 5)},
}
# Rows and columns of a weight's gradient do not depend on how many rows an expert has; the reduced dimension does.
_WEIGHT_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "many": {"m": (128,), "n": (128, 256), "k": (32, 64), "warps": (4, 8), "stages": (3, 4)},
    "some": {"m": (64, 128), "n": (128, 256), "k": (32, 64), "warps": (4, 8), "stages": (3, 4)},
    "few": {"m": (64, 128), "n": (128, 256), "k": (16,), "warps": (4, 8), "stages": (2, 3)},
}


def candidates(kernel: str, rows: str) -> Iterator[Blocks]:
    """What is tried first: the sizes in use, then all combinations."""
    now = blocks_for(kernel, ROWS_PER_EXPERT[rows] * NUM_EXPERTS, NUM_EXPERTS, torch.bfloat16)
    yield now
    sizes = (_WEIGHT_SIZES if kernel == "weight" else _SIZES)[rows]
    for values in product(*sizes.values()):
        blocks = Blocks(**(asdict(now) | dict(zip(sizes, values, strict=True))))
        fits = blocks.m * blocks.n <= 128 * 256 and blocks.m * blocks.n * (2 if kernel == "up" else 1) <= 64 * 1024
        if fits and blocks != now:
            yield blocks


def refinements(kernel: str, best: Blocks) -> Iterator[Blocks]:
    """Other orders of tiles, persistent grids and loads without TMA, at the best sizes."""
    loads = (True,) if kernel == "weight" else (True, False)  # that one reads no weights
    for group, per_sm, tma in product((4, 8, 16), (0, 1, 2), loads):
        yield replace(best, group=group, per_sm=per_sm, tma=tma)


def calls(rows: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each kernel on tensors of its own, with the blocks that `triton_ops.blocks_for` gives at the time of the call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, device=device, generator=generator).bfloat16()

    num_rows = ROWS_PER_EXPERT[rows] * NUM_EXPERTS
    num_tokens = max(num_rows // 8, 1)
    experts_N = torch.randint(NUM_EXPERTS, (num_rows,), device=device, generator=generator)
    tokens_N = torch.arange(num_rows, device=device) % num_tokens
    plan = make_plan(experts_N, tokens_N, NUM_EXPERTS)
    x_TD, dy_TD = normal(num_tokens, DIM), normal(num_tokens, DIM)
    w_up_EHD, w_down_EDF = normal(NUM_EXPERTS, 2 * HIDDEN, DIM), normal(NUM_EXPERTS, DIM, HIDDEN)
    h_NH, a_NF, weights_N = normal(num_rows, 2 * HIDDEN), normal(num_rows, HIDDEN), torch.rand(num_rows, device=device)

    def launcher() -> triton_ops.GemmLauncher:
        return triton_ops.GemmLauncher(x_TD, plan, w_down_EDF, "swiglu")

    return {
        "up": lambda: launcher().up(w_up_EHD, True),
        "rows": lambda: launcher().rows(a_NF, w_down_EDF.transpose(1, 2)),
        "activation": lambda: launcher().activation(dy_TD, w_down_EDF, h_NH, weights_N),
        "weight": lambda: launcher().weight(h_NH, x_TD, False, True, None),
    }


def timed(call: Callable[[], object], blocks: Blocks) -> tuple[float | None, str]:
    """Milliseconds, or why there are none."""
    with mock.patch.object(triton_ops, "blocks_for", lambda *_: blocks):
        try:
            return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")), ""
        except Exception as problem:  # too much shared memory or registers, or a shape that the compiler does not take
            return None, f"{type(problem).__name__}: {problem}".splitlines()[0][:100]


class _Search:
    """The times of one kernel's blocks so far, and a row of each try."""

    def __init__(self, kernel: str, rows: str, call: Callable[[], object], seconds: float, most: int | None) -> None:
        self.kernel, self.rows, self.call, self.seconds, self.most = kernel, rows, call, seconds, most
        self.started = time.monotonic()
        self.times: dict[Blocks, float] = {}
        self.rows_found: list[Row] = []

    @property
    def best(self) -> Blocks:
        return min(self.times, key=self.times.__getitem__)

    def attempt(self, every: Iterator[Blocks], share: float) -> None:
        """Time those that are new, until this share of the seconds is over."""
        for blocks in islice(every, self.most):
            if blocks in self.times or time.monotonic() - self.started > share * self.seconds:
                continue
            milliseconds, note = timed(self.call, blocks)
            row: Row = {"kernel": self.kernel, "rows_per_expert": self.rows, **asdict(blocks), "note": note}
            self.rows_found.append(row | {"ms": None if milliseconds is None else round(milliseconds, 4)})
            if milliseconds is not None:
                self.times[blocks] = milliseconds


def gate(options: Options) -> list[Check]:
    """There is a GPU; that the kernels are right on it is what the tests and ``gpu-layer`` are for."""
    if not torch.cuda.is_available():
        raise RuntimeError("tune-kernels needs a CUDA device")
    return [Check(name="device is older than sm_80", error=float(torch.cuda.get_device_capability() < (8, 0)), limit=0)]


def run(options: Options) -> list[Row]:
    """A row per try; the card's file is written at the end, from what was tried until the time was used up."""
    device, deadline = torch.device("cuda"), time.monotonic() + BUDGET_S
    waiting = len(ROWS_PER_EXPERT) * len(KERNELS)
    found: list[Row] = []
    chosen: list[dict[str, Any]] = []
    for rows in ROWS_PER_EXPERT:
        kernels = calls(rows, device)
        for kernel in KERNELS:
            share = max(deadline - time.monotonic(), 0.0) / waiting  # what is left, evenly: most of it is compiling
            waiting -= 1
            search = _Search(kernel, rows, kernels[kernel], share, 2 if options.quick else None)
            search.attempt(candidates(kernel, rows), 0.8)
            if search.times:
                search.attempt(refinements(kernel, search.best), 1.0)
                best, milliseconds = search.best, search.times[search.best]
                chosen.append({"kernel": kernel, "rows": rows, "sizes": asdict(best), "ms": round(milliseconds, 4)})
                options.report(f"{kernel} {rows}: {best}, {milliseconds:.4f} ms, of {len(search.times)} that run")
            found += search.rows_found
        torch.cuda.empty_cache()
    if not options.quick:
        path = tuned_file(torch.cuda.get_device_name())
        path.parent.mkdir(exist_ok=True)
        about = {"dim": DIM, "hidden": HIDDEN, "experts": NUM_EXPERTS, "dtype": "bfloat16", "rows": ROWS_PER_EXPERT}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        text = json.dumps({"measured_on": about | versions, "blocks": chosen}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        options.report(f"written: {path}")
    return found


_COLUMNS = ("kernel", "rows_per_expert", "m", "n", "k", "group", "warps", "stages", "per_sm", "tma", "ms", "note")

BENCHMARK = Benchmark(
    name="tune-kernels",
    description="block sizes of the Triton kernels, tried on the GPU at hand; writes kernels/tuned/CARD.json",
    columns=_COLUMNS,
    table=_COLUMNS,
    gate=gate,
    run=run,
)
