"""``kernel-resources``: what the compiler makes of the Triton kernels for Hopper; needs no GPU.

Each GEMM is compiled for compute capability 9.0 with the blocks of `moe.kernels.triton_tuning`, and its machine code read:
registers and stack per thread, shared memory per program, tensor-core instructions (``HGMMA`` is Hopper's warp-group one, ``HMMA``
the slower one of earlier cards), and local-memory loads, which are spills. These are facts about the code, not speeds.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.spec import Benchmark, Cell, Check, Options, Row
from moe.kernels import triton_gemm as gemm
from moe.kernels.triton_tuning import Blocks, blocks_for

ROWS = {"many": 512, "some": 64, "few": 4}  # rows per expert
_INDICES = ("tokens_ptr", "offsets_ptr", "experts_ptr", "starts_ptr", "total_ptr")
_FP32 = ("weights_ptr", "dweights_ptr")
VARIANTS: dict[str, tuple[str, Any, dict[str, object]]] = {
    "up": ("up", gemm.up_kernel, {"GATED": True, "SAVE_H": True, "TMA": True}),
    "down": ("rows", gemm.rows_kernel, {"stride_wk": 1, "TMA": "columns"}),
    "dx": ("rows", gemm.rows_kernel, {"stride_wn": 1, "TMA": "rows"}),
    "activation": ("activation", gemm.activation_kernel, {"GATED": True, "TMA": True}),
    "dw_down": ("weight", gemm.weight_kernel, {"GATHER_LEFT": True, "GATHER_RIGHT": False}),
    "dw_up": ("weight", gemm.weight_kernel, {"GATHER_LEFT": False, "GATHER_RIGHT": True}),
}


def _compile(kernel: Any, constants: dict[str, object], blocks: Blocks) -> Any:
    """A compiled kernel for sm_90: bf16 tensors, all sizes and addresses divisible by 16."""
    meta = blocks.meta()
    options = {key: meta.pop(key) for key in ("num_warps", "num_stages")}
    constants = {**constants, **meta, "PRECISION": "ieee"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name == "w_desc":
            by_columns = constants["TMA"] == "columns" or kernel is gemm.up_kernel
            block = (blocks.n, blocks.k) if by_columns else (blocks.k, blocks.n)
            signature[name] = f"tensordesc<bf16[{block[0]}, {block[1]}]>"
            continue
        pointer = "*i32" if name in _INDICES else "*fp32" if name in _FP32 else "*bf16"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def examine(name: str, rows: str) -> Row:
    """One row: kernel ``name`` with the blocks for ``rows`` ("many", "some", "few") rows per expert."""
    kind, kernel, constants = VARIANTS[name]
    blocks = blocks_for(kind, ROWS[rows], 1, torch.bfloat16)
    compiled = _compile(kernel, constants, blocks)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("--dump-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    counts: dict[str, Cell] = {
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", code)),
        "local_loads": len(re.findall(r"\bLDL\b", code)),
    }
    return {
        "kernel": name,
        "rows_per_expert": rows,
        "block_m": blocks.m,
        "block_n": blocks.n,
        "block_k": blocks.k,
        "warps": blocks.warps,
        "stages": blocks.stages,
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        **counts,
    }


def gate(options: Options) -> list[Check]:
    """The kernels are compiled, not interpreted, and the up-projection uses Hopper's tensor cores."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernel-resources compiles kernels; unset TRITON_INTERPRET")
    row = examine("up", "many")
    return [Check(name="up does without HGMMA", error=float(not row["hgmma"]), limit=0.0)]


def run(options: Options) -> list[Row]:
    """One row per kernel and size."""
    kernels = list(VARIANTS)[:2] if options.quick else list(VARIANTS)
    rows = []
    for name in kernels:
        for size in ("many",) if options.quick else ROWS:
            rows.append(examine(name, size))
            options.report(str(rows[-1]))
    return rows


_COLUMNS = (
    "kernel", "rows_per_expert", "block_m", "block_n", "block_k", "warps", "stages", "registers", "stack_bytes",
    "shared_kib", "hgmma", "hmma", "tma_loads", "local_loads",
)  # fmt: skip

BENCHMARK = Benchmark(
    name="kernel-resources",
    description="registers, shared memory, spills and tensor-core instructions of the Triton kernels, compiled for Hopper",
    columns=_COLUMNS,
    table=_COLUMNS,
    gate=gate,
    run=run,
)
