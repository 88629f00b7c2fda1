"""``kernel-resources``: what the compiler makes of the Triton kernels for Hopper; needs no GPU.

Each GEMM is compiled for compute capability 9.0 with the blocks of `moe.kernels.triton_tuning`, each kernel of the router for some
numbers of experts (rows and columns of its tiles stand under block m and n), and its machine code read: registers and stack per
thread, shared memory per program, tensor-core instructions (``HGMMA``, for fp8 ``QGMMA``, is Hopper's warp-group one,
``HMMA`` the slower one of earlier cards), and local-memory loads, which are spills. These are facts about the code, not speeds.
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

from benchmarks.spec import Benchmark, Check, Options, Row
from moe.kernels import triton_gemm as gemm
from moe.kernels import triton_quantized, triton_quantized_ops, triton_router
from moe.kernels.quantized import NUM_BITS
from moe.kernels.triton_tuning import Blocks, blocks_for

ROWS = {"many": 512, "some": 64, "few": 4}  # rows per expert
_INDICES = ("tokens_ptr", "offsets_ptr", "experts_ptr", "starts_ptr", "total_ptr")
_FP32 = ("weights_ptr", "dweights_ptr")
VARIANTS: dict[str, tuple[str, Any, dict[str, object]]] = {
    "up": ("up", gemm.up_kernel, {"GATED": True, "SAVE_H": True, "SAVE_A": True, "TMA": True}),
    "down": ("rows", gemm.rows_kernel, {"stride_wk": 1, "TMA": "columns"}),
    "dx": ("rows", gemm.rows_kernel, {"stride_wn": 1, "TMA": "rows"}),
    "activation": ("activation", gemm.activation_kernel, {"GATED": True, "TMA": True}),
    "dw_down": ("weight", gemm.weight_kernel, {"GATHER_LEFT": True, "GATHER_RIGHT": False, "ACCUMULATE": False}),
    "dw_up": ("weight", gemm.weight_kernel, {"GATHER_LEFT": False, "GATHER_RIGHT": True, "ACCUMULATE": False}),
}
# Experts, groups, choices and options of a router: DeepSeek-V3's, and some without groups.
ROUTERS: dict[str, tuple[int, int, int, dict[str, object]]] = {
    "softmax": (128, 1, 8, {}),
    "few": (8, 1, 2, {}),
    "deepseek": (256, 8, 8, {"SIGMOID": True, "BIASED": True, "TOP_GROUPS": 4, "SUM_OF_TWO": True}),
    "large": (1024, 1, 32, {}),
}
# Scheme, group size and zero points of quantised weights; blocks are those of `moe.kernels.triton_quantized_ops`.
QUANTIZED: dict[str, tuple[str, int, bool]] = {
    "w4a16": ("w4a16", 128, False),
    "w4a16 asymmetric": ("w4a16", 128, True),
    "w8a16": ("w8a16", 128, False),
    "fp8 rows": ("fp8", 0, False),
    "fp8 blocks": ("fp8", 128, False),
}
_ROUTER_TYPES = {"ids_ptr": "*i64", "count_ptr": "*i32", "kept_ptr": "*i32", "keep_ptr": "*i1", "scale": "fp32"}


def _compile(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, int], missing: str = "*bf16"
) -> Any:
    """A compiled kernel for sm_90, with all sizes and addresses divisible by 16; pointers not in ``types`` are ``missing``."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, missing if name.endswith("_ptr") else "i32")
        if signature[name].startswith(("*", "i")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _compile_gemm(kernel: Any, constants: dict[str, Any], blocks: Blocks) -> Any:
    """With bf16 tensors."""
    meta = blocks.meta()
    options = {key: meta.pop(key) for key in ("num_warps", "num_stages")}
    by_columns = constants.get("TMA") == "columns" or kernel is gemm.up_kernel
    block = (blocks.n, blocks.k) if by_columns else (blocks.k, blocks.n)
    types = dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(_FP32, "*fp32")
    types["w_desc"] = f"tensordesc<bf16[{block[0]}, {block[1]}]>"
    return _compile(kernel, {**constants, **meta, "PRECISION": "ieee"}, types, options)


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _read(compiled: Any) -> Row:
    """What the machine code says."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("--dump-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        "hgmma": len(re.findall(r"\b[HQ]GMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", code)),
        "local_loads": len(re.findall(r"\bLDL\b", code)),
    }


def examine(name: str, rows: str) -> Row:
    """One row: GEMM ``name`` with the blocks for ``rows`` ("many", "some", "few") rows per expert."""
    kind, kernel, constants = VARIANTS[name]
    blocks = blocks_for(kind, ROWS[rows], 1, torch.bfloat16)
    return {
        "kernel": name,
        "rows_per_expert": rows,
        "block_m": blocks.m,
        "block_n": blocks.n,
        "block_k": blocks.k,
        "warps": blocks.warps,
        "stages": blocks.stages,
        **_read(_compile_gemm(kernel, constants, blocks)),
    }


def examine_router(name: str) -> list[Row]:
    """Forward and backward of the router ``name`` on fp32 logits with a padding mask."""
    num_experts, num_groups, top_k, given = ROUTERS[name]
    options = {"SIGMOID": False, "AFTER": False, "RENORMALIZE": True, "MASKED": True, "K": top_k} | given
    rows: list[Row] = []
    for kernel, groups in ((triton_router.route_kernel, num_groups), (triton_router.route_backward_kernel, 1)):
        meta = triton_router.blocks(num_experts, groups, top_k)
        warps = meta.pop("num_warps")
        every = {"BIASED": False, "NUM_GROUPS": groups, "TOP_GROUPS": 1, "SUM_OF_TWO": False} | options | meta
        constants = {key: value for key, value in every.items() if key in kernel.arg_names}
        compiled = _compile(kernel, constants, _ROUTER_TYPES, {"num_warps": warps, "num_stages": 3}, "*fp32")
        rows.append(
            {
                "kernel": f"{kernel.__name__.removesuffix('_kernel')} {name}, E={num_experts} K={top_k}",
                "block_m": meta["ROWS"],
                "block_n": meta["GROUPS"] * meta["WIDTH"],
                "warps": warps,
                **_read(compiled),
            }
        )
    return rows


def examine_quantized(name: str, rows: str) -> list[Row]:
    """Up- and down-projection with weights ``QUANTIZED[name]``."""
    scheme, group_size, asymmetric = QUANTIZED[name]
    num_bits = NUM_BITS.get(scheme, 0)
    types = dict.fromkeys((*_INDICES, "zero_ptr"), "*i32") | {"w_ptr": "*i32" if num_bits else "*fp8e4nv"}
    if not num_bits:
        types |= dict.fromkeys(("x_ptr", "rows_ptr"), "*fp8e4nv")
        types |= dict.fromkeys(("scale_ptr", "x_scale_ptr", "row_scale_ptr"), "*fp32")
    options = {"BITS": num_bits, "GROUP": group_size, "ASYMMETRIC": asymmetric, "GATED": True, "SAVE_H": False}
    found: list[Row] = []
    for kind, kernel in (("up", triton_quantized.up_kernel), ("rows", triton_quantized.rows_kernel)):
        blocks = triton_quantized_ops.blocks_for(kind, scheme, ROWS[rows], 1, torch.bfloat16)
        meta = blocks.meta()
        launch = {key: meta.pop(key) for key in ("num_warps", "num_stages")}
        constants = {key: value for key, value in options.items() if key in kernel.arg_names}
        compiled = _compile(kernel, {**constants, **meta, "PRECISION": "ieee"}, types, launch)
        found.append(
            {
                "kernel": f"{'up' if kind == 'up' else 'down'} {name}",
                "rows_per_expert": rows,
                "block_m": blocks.m,
                "block_n": blocks.n,
                "block_k": blocks.k,
                "warps": blocks.warps,
                "stages": blocks.stages,
                **_read(compiled),
            }
        )
    return found


def gate(options: Options) -> list[Check]:
    """The kernels are compiled, not interpreted, and the up-projection uses Hopper's tensor cores."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernel-resources compiles kernels; unset TRITON_INTERPRET")
    row = examine("up", "many")
    return [Check(name="up does without HGMMA", error=float(not row["hgmma"]), limit=0.0)]


def run(options: Options) -> list[Row]:
    """One row per GEMM and size, also of quantised weights, and two per router."""
    kernels = list(VARIANTS)[:2] if options.quick else list(VARIANTS)
    rows = []
    for name in kernels:
        for size in ("many",) if options.quick else ROWS:
            rows.append(examine(name, size))
            options.report(str(rows[-1]))
    for name in ["few"] if options.quick else ROUTERS:
        rows += examine_router(name)
        options.report(str(rows[-2:]))
    for name in ["fp8 rows"] if options.quick else QUANTIZED:
        for size in ("many",) if options.quick else ROWS:
            rows += examine_quantized(name, size)
            options.report(str(rows[-2:]))
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
