"""Sorting and tiling on the device, against torch's sort and a loop; and the ops' own promises to torch."""

from itertools import product

import pytest
import torch
import triton
from helpers.ffn_case import fixed_k, routing_of
from helpers.triton_blocks import small_blocks

from moe.kernels import triton_launch, triton_ops, triton_quantized_ops, triton_tuning
from moe.kernels.triton_plan import make_plan, make_tiles
from moe.kernels.triton_tuning import Blocks, blocks_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def choices(kind: str, num_assignments: int, num_experts: int) -> torch.Tensor:
    if kind == "uniform":
        return torch.randint(num_experts, (num_assignments,), device=DEVICE)
    if kind == "one expert":
        return torch.full((num_assignments,), num_experts - 1, device=DEVICE)
    return (torch.rand(num_assignments, device=DEVICE) ** 6 * num_experts).long()  # skewed


@pytest.mark.parametrize("kind", ["uniform", "one expert", "skewed"])
@pytest.mark.parametrize(("num_assignments", "num_experts"), [(0, 3), (1, 1), (37, 5), (300, 20), (65, 130)])
def test_plan_and_tiles(kind: str, num_assignments: int, num_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)  # several blocks per sort
    expert_ids_N = choices(kind, num_assignments, num_experts)
    token_ids_N = torch.randint(1000, (num_assignments,), device=DEVICE)
    plan = make_plan(expert_ids_N, token_ids_N, num_experts)
    order_N = expert_ids_N.argsort(stable=True)
    assert torch.equal(plan.order_N.long(), order_N)
    assert torch.equal(plan.position_N.long()[order_N], torch.arange(num_assignments, device=DEVICE))
    assert torch.equal(plan.token_ids_N.long(), token_ids_N[order_N])
    counts_E = torch.bincount(expert_ids_N, minlength=num_experts)
    assert plan.offsets_E1.tolist() == [0, *counts_E.cumsum(0).tolist()]

    tiles = make_tiles(plan, rows=16)
    offsets = plan.offsets_E1.tolist()
    expected = [(e, start) for e in range(num_experts) for start in range(offsets[e], offsets[e + 1], 16)]
    total = int(tiles.total_1)
    assert list(zip(tiles.experts_M[:total].tolist(), tiles.starts_M[:total].tolist(), strict=True)) == expected
    assert total <= tiles.experts_M.numel() <= num_assignments // 16 + num_experts


def test_block_sizes_do_not_depend_on_the_exact_number_of_tokens() -> None:
    for kernel in ("up", "rows", "activation", "weight"):
        for dtype in (torch.bfloat16, torch.float32):
            found = {blocks_for(kernel, rows, 64, dtype) for rows in range(64 * 96, 64 * 4000, 997)}
            assert len(found) == 1
            assert blocks_for(kernel, 0, 64, dtype).m <= blocks_for(kernel, 64 * 500, 64, dtype).m


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_programs_fit_the_shared_memory_of_smaller_cards(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tuning, "_capability", lambda: capability)
    most = {(8, 0): 163, (9, 0): 227}.get(capability, 99)
    for kernel, rows, dtype in product(
        ("up", "rows", "activation", "weight"), (1, 64, 4096), (torch.bfloat16, torch.float32)
    ):
        blocks = blocks_for(kernel, rows, 1, dtype)
        tiles = blocks.m + blocks.n * (2 if kernel == "up" else 1)
        assert (blocks.stages - (capability != (9, 0))) * blocks.k * tiles * dtype.itemsize <= most * 1024
    few = blocks_for("up", 1, 1, torch.bfloat16)
    assert few.stages == (3 if most > 99 else 2), "no fewer stages than it takes"


def test_both_kinds_of_weights_have_the_same_classes_of_rows() -> None:
    for rows in (0, 31, 32, 95, 96, 5000):
        name = triton_tuning.rows_class(rows, 1)
        assert name == ("many" if rows >= 96 else "some" if rows >= 32 else "few")
        assert blocks_for("up", rows, 1, torch.bfloat16) == triton_tuning._HALF["up", name]
        found = triton_quantized_ops.blocks_for("up", "fp8", rows, 1, torch.bfloat16)
        assert found == triton_quantized_ops._FP8["up", name]


def test_fp32_products_are_as_precise_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for value in ("tf32", "ieee"):  # the newer of torch's two switches: the older cannot be read any more then
            matmul.fp32_precision = value
            assert triton_launch.precision(torch.float32) == value
            assert triton_launch.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("top_k", [2, 0], ids=["fixed", "variable"])
def test_the_op_keeps_what_it_promises_torch(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and autograd registration agree with what the op does."""
    monkeypatch.undo()
    small_blocks(monkeypatch)
    case = fixed_k(7, 3, 2, dim=5, hidden=4)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in case.leaves()]
    routing = routing_of(case, leaves[1])
    x_TD, weights_N, w_up_EHD, w_down_EDF = leaves
    ids = (routing.expert_ids_N.to(DEVICE), routing.token_ids_N.to(DEVICE))
    args = (x_TD, weights_N, w_up_EHD, w_down_EDF, *ids, top_k, "swiglu", True, [])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moe.expert_ffn.default, args, test_utils=tests)


def test_weights_come_through_descriptors_where_they_can() -> None:
    blocks = Blocks(m=16, n=16, k=16)
    weights = torch.randn(3, 32, 16, device=DEVICE, dtype=torch.bfloat16)
    on_card = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert (triton_ops._descriptor(weights, [16, 16], blocks) is not None) == on_card
    assert triton_ops._descriptor(weights.transpose(1, 2), [16, 16], blocks) is None, "not contiguous"
    assert triton_ops._descriptor(weights[..., :7].contiguous(), [16, 16], blocks) is None, "rows of 14 bytes"
    assert triton_ops._descriptor(weights, [16, 16], Blocks(m=16, n=16, k=16, tma=False)) is None


def test_triton_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU these tests mean something only under the interpreter."""
    assert torch.cuda.is_available() or triton.knobs.runtime.interpret
    assert triton_ops.problem(DEVICE, torch.bfloat16) is None
