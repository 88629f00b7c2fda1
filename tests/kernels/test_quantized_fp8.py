"""fp8: rounding of rows, the forward of training against float64, its straight-through gradients; and what torch is promised."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.ffn_case import GRADIENTS, Case, expect, fixed_k, make_case, routing_of, with_tensors
from helpers.quantized_case import (
    DEVICE,
    expect_fp8,
    fp8_hidden,
    quantize_case,
    round_fp8,
    small_quantized_blocks,
)
from torch import Tensor

from moe.kernels import quantized, triton_quantized_ops
from moe.types import Routing


def fused(x_TD: Tensor, routing: Routing, w_up_EHD: Tensor, w_down_EDF: Tensor, activation: str) -> Tensor:
    """The Triton kernels, on a GPU where there is one."""
    names = ("token_ids_N", "expert_ids_N", "weights_N", "counts_E")
    routing = replace(routing, **{name: getattr(routing, name).to(DEVICE) for name in names})
    weights = (w_up_EHD.to(DEVICE), w_down_EDF.to(DEVICE))
    return triton_quantized_ops.expert_ffn_fp8(x_TD.to(DEVICE), routing, *weights, activation).to(x_TD.device)


def fused_quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = triton_quantized_ops.quantize_rows(rows.to(DEVICE))
    return codes.cpu(), scale.cpu()


FFN = {"reference": quantized.expert_ffn_fp8, "triton": fused}


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_quantized_blocks(monkeypatch)


@pytest.fixture(params=list(FFN))
def ffn(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return FFN[request.param]


def test_rows_are_rounded_the_same_by_both() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2  # all ties between neighbours, and all values themselves
    rows = torch.zeros(6, 600)
    rows[0, : len(codes)], rows[1, : len(middles)] = codes, middles
    rows[1, -1] = -448
    rows[2] = torch.randn(600) * torch.exp(4 * torch.randn(600))
    rows[3] = torch.randn(600) * 1e-30
    rows[4] = torch.randn(600) * 1e30
    expected, scale = quantized.quantize_rows(rows)
    got, got_scale = fused_quantize_rows(rows)
    assert torch.equal(got.float(), expected.float())
    assert torch.equal(got_scale, scale)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert torch.equal(expected[0, : len(codes)].float(), codes)
    assert scale[5] == 1
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(3, 37).to(dtype)
        for one, other in zip(fused_quantize_rows(narrow), quantized.quantize_rows(narrow), strict=True):
            assert torch.equal(one.float(), other.float())


def test_a_nan_in_a_row_stays_one() -> None:
    rows = torch.randn(3, 5)
    rows[1, 2] = torch.nan
    for quantize in (quantized.quantize_rows, fused_quantize_rows):
        assert quantize(rows)[1].isnan().tolist() == [False, True, False]


def run(ffn: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    x_TD, weights_N, w_up_EHD, w_down_EDF = leaves
    y_TD = ffn(x_TD, routing_of(case, weights_N), w_up_EHD, w_down_EDF, case.activation)
    y_TD.backward(case.dy_TD)
    return {"y": y_TD.detach()} | {name: leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}


def straight_through(case: Case) -> dict[str, Tensor]:
    """Output of the fp8 loop, and in float64 the gradients of the unquantised FFN where its pre-activation is the fp8 one."""
    leaves = [leaf.requires_grad_() for leaf in case.leaves(torch.float64)]
    x_TD, weights_N, w_up_EHD, w_down_EDF = leaves
    rounded_EHD = torch.stack([torch.stack([round_fp8(row) for row in w]) for w in case.w_up_EHD])
    total = x_TD.new_zeros(())
    for n, (t, e) in enumerate(zip(case.token_ids, case.expert_ids, strict=True)):
        h_H = w_up_EHD[e] @ x_TD[t]
        h_H = h_H + (fp8_hidden(case.x_TD[t], rounded_EHD[e], case.activation)[0] - h_H).detach()
        eye = torch.eye(len(h_H), dtype=torch.float64)
        out_D = oracles.dense_ffn(h_H[None], eye, w_down_EDF[e], case.activation)[0]
        total = total + weights_N[n] * (out_D @ case.dy_TD[t].double())
    if not case.token_ids:
        total = sum((leaf * 0).sum() for leaf in leaves)
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    y_TD = expect_fp8(case, quantize_case(case, "fp8"))
    return {"y": y_TD} | dict(zip(GRADIENTS, found, strict=True))


CASES = {
    "fixed_k": lambda **kw: fixed_k(9, 4, 2, dim=19, hidden=7, **kw),
    "empty_experts": lambda **kw: make_case(
        [0, 0, 1, 1, 2, 2], [1, 4, 4, 1, 1, 4], top_k=2, num_tokens=3, num_experts=6, **kw
    ),
    "variable": lambda **kw: make_case([0, 0, 0, 2, 3, 3, 6], [2, 0, 1, 2, 2, 4, 0], num_tokens=8, num_experts=5, **kw),
    "no_assignments": lambda **kw: make_case([], [], num_tokens=4, num_experts=3, **kw),
}


@pytest.mark.parametrize(("name", "activation"), [*((name, "swiglu") for name in CASES), ("fixed_k", "gelu")])
def test_training(name: str, activation: str, ffn: Callable[..., Tensor]) -> None:
    case = CASES[name](activation=activation)
    got, expected = run(ffn, case), straight_through(case)
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        assert_close(key, got[key], value, torch.float32)


def test_training_in_bf16(ffn: Callable[..., Tensor]) -> None:
    case = fixed_k(7, 3, 2, dim=19, hidden=24, dtype=torch.bfloat16)
    got, expected = run(ffn, case), straight_through(case)
    for key, value in expected.items():
        assert got[key].dtype == (torch.float32 if key == "dweights" else torch.bfloat16)
        # In the mean only: an activation's last bit, of 8, can move its fp8 code by a step of 1/8.
        relative = ((got[key].double() - value).square().mean() / value.square().mean()).sqrt()
        assert relative < 0.05, (key, relative)


def test_it_is_fp8_and_near_the_exact_ffn(ffn: Callable[..., Tensor]) -> None:
    case = fixed_k(8, 2, 1, dim=32, hidden=32)
    got, exact = run(ffn, case), expect(case)
    for key, value in exact.items():
        relative = ((got[key].double() - value).square().mean() / value.square().mean()).sqrt()
        assert 0.003 < relative < 0.1, (key, relative)


def test_without_gradients_nothing_is_kept(ffn: Callable[..., Tensor]) -> None:
    case = fixed_k(5, 3, 2, dim=8, hidden=4)
    x_TD, weights_N, w_up_EHD, w_down_EDF = case.leaves()
    y_TD = ffn(x_TD, routing_of(case, weights_N), w_up_EHD, w_down_EDF, "swiglu")
    assert not y_TD.requires_grad
    assert torch.equal(y_TD, run(ffn, case)["y"])


def test_frozen_weights(ffn: Callable[..., Tensor]) -> None:
    case = fixed_k(5, 3, 2, dim=8, hidden=4)
    x_TD, weights_N, w_up_EHD, w_down_EDF = case.leaves()
    x_TD.requires_grad_()
    ffn(x_TD, routing_of(case, weights_N), w_up_EHD, w_down_EDF, "swiglu").backward(case.dy_TD)
    assert_close("dx", x_TD.grad, run(ffn, case)["dx"], torch.float32)
    assert w_up_EHD.grad is None


def test_repeats_bit_for_bit() -> None:
    case = fixed_k(5, 2, 1, dim=19, hidden=7)
    first, again = (run(FFN["triton"], case) for _ in range(2))
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_it_learns() -> None:
    """Master weights of fp32 take steps that are far smaller than fp8's."""
    case = fixed_k(16, 2, 1, dim=16, hidden=16)
    target_TD = torch.randn(16, 16)
    w_up, w_down = (torch.nn.Parameter(w) for w in case.leaves()[2:])
    optimizer = torch.optim.Adam([w_up, w_down], lr=3e-3)
    losses = []
    for _ in range(60):
        y_TD = FFN["reference"](case.x_TD, routing_of(case, case.weights_N), w_up, w_down, "swiglu")
        loss = (y_TD - target_TD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("top_k", [2, 0], ids=["fixed", "variable"])
def test_the_ops_keep_what_they_promise_torch(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and autograd registration agree with what the ops do."""
    monkeypatch.undo()
    small_quantized_blocks(monkeypatch)
    case = fixed_k(5, 3, 2, dim=8, hidden=4)
    routing, leaves = routing_of(case, case.weights_N), [leaf.to(DEVICE) for leaf in case.leaves()]
    ids = (routing.expert_ids_N.to(DEVICE), routing.token_ids_N.to(DEVICE))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (*(leaf.requires_grad_() for leaf in leaves), *ids, top_k, "swiglu", True, [])
    torch.library.opcheck(torch.ops.moe.expert_ffn_fp8.default, args, test_utils=tests)
    for scheme, symmetric in (("w4a16", False), ("fp8", True)):
        pair = quantize_case(case, scheme, symmetric=symmetric).to(DEVICE)
        parts = (triton_quantized_ops._parts(pair.up), triton_quantized_ops._parts(pair.down))
        args = (leaves[0].detach(), leaves[1].detach(), *parts, *ids, top_k, "swiglu", scheme, 0, 0)
        able = (
            tests if scheme != "fp8" else tests[1:]
        )  # test_schema compares inputs by arithmetic, which torch has not for fp8
        torch.library.opcheck(torch.ops.moe.expert_ffn_quantized.default, args, test_utils=able)


def test_the_scale_of_a_row_is_its_own() -> None:
    """A token of huge values changes no other token."""
    case = fixed_k(5, 2, 1, dim=16, hidden=8)
    loud_TD = case.x_TD.clone()
    loud_TD[3] *= 1e4
    for ffn in FFN.values():
        outputs = [
            ffn(x_TD, routing_of(case, case.weights_N), case.w_up_EHD, case.w_down_EDF, "swiglu")
            for x_TD in (case.x_TD, loud_TD)
        ]
        others = torch.arange(5) != 3
        assert torch.equal(outputs[0][others], outputs[1][others])
        expected = expect_fp8(with_tensors(case, x_TD=loud_TD), quantize_case(case, "fp8"))
        assert_close("y", outputs[1], expected, torch.float32)
