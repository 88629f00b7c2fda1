"""Weights in the layout of torch's CPU kernels against the checkpoint's layout, which is their oracle."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.close import assert_close
from helpers.ffn_case import Case, fixed_k, make_case, routing_of
from helpers.quantized_case import expect_integer, quantize_case
from torch import Tensor

from moe.kernels import ops, quantized_cpu
from moe.kernels.quantized import QuantizedWeight, dequantize, quantize_weight
from moe.kernels.quantized_cpu import MOST_ROWS, Int4Weight, Int8Weight, for_cpu, kernel_problem

HAS_KERNELS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="torch has these kernels for AVX2 and AVX-512")

# scheme, group size, symmetric, P, Q
KERNEL_WEIGHTS = {
    "w4_row": ("w4a16", None, True, 48, 96),
    "w4_row_asymmetric": ("w4a16", None, False, 16, 32),
    "w4_32_asymmetric": ("w4a16", 32, False, 80, 64),
    "w4_64": ("w4a16", 64, True, 144, 192),
    "w4_128": ("w4a16", 128, True, 64, 256),
    "w8_row": ("w8a16", None, True, 48, 96),
    "w8_row_odd_rows": ("w8a16", None, True, 7, 48),
}
OTHER_WEIGHTS = {
    "w8_odd": ("w8a16", None, True, 19, 7),
    "w8_asymmetric": ("w8a16", None, False, 9, 32),
    "w8_32": ("w8a16", 32, True, 7, 96),
    "w8_64_asymmetric": ("w8a16", 64, False, 5, 128),
}


def make_weight(name: str, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    scheme, group_size, symmetric, rows, columns = (KERNEL_WEIGHTS | OTHER_WEIGHTS)[name]
    weight_EPQ = torch.randn(3, rows, columns) / columns**0.5 + (0 if symmetric else 0.02)
    return quantize_weight(weight_EPQ.to(dtype), scheme, group_size, symmetric)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that a kernel was given."""
    calls: list[int] = []

    def counted(rows_rQ: Tensor) -> Tensor:
        calls.append(rows_rQ.shape[0])
        return aligned(rows_rQ)

    aligned = quantized_cpu._aligned
    monkeypatch.setattr(quantized_cpu, "_aligned", counted)
    return calls


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*KERNEL_WEIGHTS, *OTHER_WEIGHTS])
def test_products(name: str, stored: torch.dtype) -> None:
    weight = make_weight(name, stored)
    fast = for_cpu(weight)
    assert isinstance(fast, Int4Weight if weight.scheme == "w4a16" and HAS_KERNELS else Int8Weight)
    assert fast.shape == weight.shape
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for num_rows in (1, 3, MOST_ROWS[8], MOST_ROWS[8] + 1, MOST_ROWS[4], MOST_ROWS[4] + 1):
            rows_rQ = torch.randn(num_rows, weight.shape[2]).to(dtype)
            expected_rP = rows_rQ.double() @ dequantize(weight.expert(1), torch.float64)[0].T
            got_rP = fast.product(rows_rQ, 1)
            assert got_rP.dtype == dtype
            assert_close(f"{name}, {num_rows} rows", got_rP, expected_rP, dtype)
    assert fast.product(torch.empty(0, weight.shape[2], dtype=torch.bfloat16), 1).shape == (0, weight.shape[1])


@needs_kernels
@pytest.mark.parametrize("name", [*KERNEL_WEIGHTS, *OTHER_WEIGHTS])
def test_kernels_run_where_they_can(name: str, kernel_calls: list[int]) -> None:
    weight = make_weight(name)
    fast, most = for_cpu(weight), MOST_ROWS[8 if weight.scheme == "w8a16" else 4]
    assert fast is not None
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows in (1, most, most + 1):
            fast.product(torch.randn(num_rows, weight.shape[2]).to(dtype), 0)
    takes = name in KERNEL_WEIGHTS
    assert kernel_calls == ([1, most] if takes else [])
    assert (kernel_problem(weight) is None) == takes


@pytest.mark.parametrize("name", [*KERNEL_WEIGHTS, *OTHER_WEIGHTS])
def test_the_way_back_is_exact(name: str) -> None:
    weight = make_weight(name)
    fast = for_cpu(weight)
    assert fast is not None
    back = fast.rows()
    assert (back.scheme, back.shape, back.group_size) == (weight.scheme, weight.shape, weight.group_size)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero_point is None) == (weight.zero_point is None)
    assert back.zero_point is None or torch.equal(back.zero_point, weight.zero_point)


def test_memory_is_that_of_the_checkpoint_and_the_kernels_scales() -> None:
    weight_EPQ = torch.randn(2, 256, 512).bfloat16()
    for scheme, group_size, share in (("w8a16", None, 0.506), ("w4a16", 64, 0.297), ("w4a16", 128, 0.274)):
        weight = quantize_weight(weight_EPQ, scheme, group_size)
        fast = for_cpu(weight) or weight
        assert fast.num_bytes / (2 * weight_EPQ.numel()) <= share, scheme


@needs_kernels
def test_rows_at_any_address(kernel_calls: list[int]) -> None:
    """The 8-bit kernel loads from addresses that it takes to be aligned; a view may begin anywhere."""
    for name in ("w8_row", "w4_row"):
        weight = make_weight(name)
        fast, flat = for_cpu(weight), torch.randn(8 + 5 * 96).bfloat16()
        assert fast is not None
        for offset in (1, 2, 8):
            rows_rQ = flat[offset : offset + 5 * 96].view(5, 96)
            assert torch.equal(fast.product(rows_rQ, 2), fast.product(rows_rQ.clone(), 2))
        wide = torch.randn(5, 192).bfloat16()
        assert torch.equal(fast.product(wide[:, ::2], 0), fast.product(wide[:, ::2].contiguous(), 0))
    assert kernel_calls


def test_what_has_no_layout_of_its_own() -> None:
    for scheme, rows, columns in (("w4a16", 19, 32), ("w4a16", 32, 40), ("fp8", 32, 32)):
        weight = quantize_weight(torch.randn(2, rows, columns), scheme)
        assert for_cpu(weight) is None
        assert kernel_problem(weight) is not None


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (quantized_cpu._int4_layout, quantized_cpu._runs_int8)

    def missing(*_: object) -> Tensor:
        raise RuntimeError("no kernel for this machine")

    def wrong(rows_rQ: Tensor, *_: object) -> Tensor:
        return torch.zeros(rows_rQ.shape[0], 144 if rows_rQ.shape[1] == 64 else 7, dtype=rows_rQ.dtype)

    for kernel in (missing, wrong):
        aten = type("aten", (), {"_weight_int8pack_mm": kernel, "_weight_int4pack_mm_for_cpu": kernel})
        aten._convert_weight_to_int4pack_for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        monkeypatch.setattr(torch, "ops", type("ops", (), {"aten": aten}))
        monkeypatch.setattr(quantized_cpu, "_HAS_KERNELS", True)
        for check in checks:
            check.cache_clear()
        try:
            assert for_cpu(make_weight("w4_row")) is None
            fast = for_cpu(weight := make_weight("w8_row"))
            assert isinstance(fast, Int8Weight)
            assert fast.kernel_scale_EP is None
            rows_rQ = torch.randn(2, 96)
            assert_close("w8", fast.product(rows_rQ, 0), weight.product(rows_rQ, 0), torch.float32)
        finally:
            monkeypatch.undo()
            for check in checks:
                check.cache_clear()


CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: fixed_k(1, 4, 2, dim=96, hidden=32, dtype=torch.bfloat16),
    "some": lambda: fixed_k(13, 5, 3, dim=64, hidden=32, dtype=torch.bfloat16),
    "many": lambda: fixed_k(80, 2, 2, dim=32, hidden=32, dtype=torch.bfloat16),
    "gelu": lambda: fixed_k(5, 3, 2, dim=64, hidden=32, activation="gelu", dtype=torch.bfloat16),
    "odd": lambda: fixed_k(5, 3, 2, dim=37, hidden=21, dtype=torch.bfloat16),  # 4 bits: neither has a kernel
    "odd_up": lambda: fixed_k(5, 3, 2, dim=32, hidden=24, dtype=torch.bfloat16),  # 4 bits: only the up-projection has
    "one_expert": lambda: make_case(
        [0, 1], [0, 0], top_k=1, num_tokens=2, num_experts=1, dim=32, hidden=32, dtype=torch.bfloat16
    ),
    "empty_experts": lambda: make_case(
        [0, 0, 1, 1], [1, 4, 4, 1], top_k=2, num_tokens=2, num_experts=6, dim=32, hidden=32, dtype=torch.bfloat16
    ),
    "no_tokens": lambda: make_case(
        [], [], top_k=2, num_tokens=0, num_experts=3, dim=32, hidden=32, dtype=torch.bfloat16
    ),
}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_expert_ffn(name: str, symmetric: bool, scheme: str) -> None:
    case = CASES[name]()
    pair = quantize_case(case, scheme, None, symmetric)
    up, down = for_cpu(pair.up) or pair.up, for_cpu(pair.down) or pair.down
    routing = routing_of(case, case.weights_N)
    got_TD = ops.expert_ffn_quantized(case.x_TD, routing, up, down, case.activation)
    assert_close(name, got_TD, expect_integer(case, pair), torch.bfloat16)
    reference_TD = ops.expert_ffn_quantized(case.x_TD, routing, pair.up, pair.down, case.activation)
    assert_close(name, got_TD, reference_TD, torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_layouts_of_other_machines(capability: str) -> None:
    """torch packs 4-bit codes for the width of the vectors that it uses."""
    here = {"AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability())
    if capability == here:
        pytest.skip("that is this machine's own")
    program = (
        "import torch; from moe.kernels import quantized_cpu as cpu; from moe.kernels.quantized import quantize_weight\n"
        "cpu._HAS_KERNELS = True\n"
        "weight = quantize_weight(torch.randn(2, 80, 64), 'w4a16', 32, False)\n"
        "assert torch.equal(cpu.for_cpu(weight).rows().packed, weight.packed); print(cpu._int4_layout())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != str(quantized_cpu._int4_layout())
