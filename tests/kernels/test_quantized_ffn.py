"""`ops.expert_ffn_quantized` against float64 loops: integers on the dequantised weights, fp8 on rounded operands."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.close import assert_close
from helpers.ffn_case import Case, expect, fixed_k, make_case, routing_of, with_tensors
from helpers.quantized_case import (
    Pair,
    expect_fp8,
    expect_integer,
    quantize_case,
    run_quantized,
    small_quantized_blocks,
)

from moe.kernels import ops, triton_quantized_ops
from moe.kernels.quantized import dequantize


@pytest.fixture(autouse=True, params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOE_KERNELS", request.param)
    small_quantized_blocks(monkeypatch)
    return request.param


def check(case: Case, pair: Pair) -> torch.Tensor:
    got = run_quantized(case, pair)
    expected = (expect_fp8 if pair.up.scheme == "fp8" else expect_integer)(case, pair)
    assert got.dtype == case.x_TD.dtype
    assert_close(pair.up.scheme, got, expected, case.x_TD.dtype)
    return got


ROUTINGS: dict[str, Callable[..., Case]] = {
    "fixed_k": lambda **kw: fixed_k(13, 5, 3, **kw),
    "one_token": lambda **kw: fixed_k(1, 4, 2, **kw),
    "all_to_one": lambda **kw: make_case(list(range(19)), [3] * 19, top_k=1, num_tokens=19, num_experts=5, **kw),
    "empty_experts": lambda **kw: make_case(
        [0, 0, 1, 1, 2, 2], [1, 4, 4, 1, 1, 4], top_k=2, num_tokens=3, num_experts=6, **kw
    ),
    "variable": lambda **kw: make_case([0, 0, 0, 2, 3, 3, 6], [2, 0, 1, 2, 2, 4, 0], num_tokens=8, num_experts=5, **kw),
    "unordered": lambda **kw: make_case([4, 1, 0, 4, 1, 4], [0, 0, 1, 1, 2, 2], num_tokens=5, num_experts=3, **kw),
    "duplicates": lambda **kw: make_case([1, 1, 0, 1, 0], [2, 2, 2, 0, 2], num_tokens=3, num_experts=3, **kw),
    "no_assignments": lambda **kw: make_case([], [], num_tokens=4, num_experts=3, **kw),
    "no_tokens": lambda **kw: make_case([], [], top_k=2, num_tokens=0, num_experts=3, **kw),
}
# scheme, group size, symmetric, D, F; without groups nothing needs to divide anything
WEIGHTS = {
    "w4_row_odd": ("w4a16", None, True, 19, 7),
    "w4_row_asymmetric_odd": ("w4a16", None, False, 37, 21),
    "w4_32": ("w4a16", 32, True, 96, 32),
    "w4_64_asymmetric": ("w4a16", 64, False, 64, 64),
    "w4_128": ("w4a16", 128, True, 128, 128),
    "w8_row_odd": ("w8a16", None, True, 19, 7),
    "w8_row_asymmetric_odd": ("w8a16", None, False, 37, 21),
    "w8_32_asymmetric": ("w8a16", 32, False, 32, 96),
    "w8_128": ("w8a16", 128, True, 128, 128),
    "fp8_row_odd": ("fp8", None, True, 37, 7),
    "fp8_row": ("fp8", None, True, 64, 32),
    "fp8_blocks": ("fp8", 128, True, 150, 40),  # the gate's and the up-projection's rows share a block
    "fp8_blocks_below_each_other": ("fp8", 128, True, 20, 140),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("weights", ["w4_row_asymmetric_odd", "fp8_row_odd"])
def test_every_routing(routing: str, weights: str) -> None:
    scheme, group_size, symmetric, dim, hidden = WEIGHTS[weights]
    case = ROUTINGS[routing](dim=dim, hidden=hidden)
    check(case, quantize_case(case, scheme, group_size, symmetric))


@pytest.mark.parametrize(
    ("weights", "activation"),
    [*((name, "swiglu") for name in WEIGHTS), ("w4_row_asymmetric_odd", "gelu"), ("fp8_blocks", "gelu")],
)
def test_every_kind_of_weight(weights: str, activation: str) -> None:
    scheme, group_size, symmetric, dim, hidden = WEIGHTS[weights]
    case = fixed_k(5, 3, 2, dim=dim, hidden=hidden, activation=activation)
    check(case, quantize_case(case, scheme, group_size, symmetric))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["w4_32", "w4_row_asymmetric_odd", "w8_32_asymmetric", "fp8_row", "fp8_blocks"])
def test_half_precision(weights: str, dtype: torch.dtype) -> None:
    scheme, group_size, symmetric, dim, hidden = WEIGHTS[weights]
    case = fixed_k(5, 3, 2, dim=dim, hidden=hidden, dtype=dtype)
    pair = quantize_case(case, scheme, group_size, symmetric)
    got, expected = run_quantized(case, pair), (expect_fp8 if scheme == "fp8" else expect_integer)(case, pair)
    if (
        scheme == "fp8"
    ):  # an activation's last bit, of 8 or 11, can decide about one of fp8's 4: a step of 1/8 of one of F terms
        dtype = torch.bfloat16
    assert_close(weights, got, expected, dtype)


@pytest.mark.parametrize("k", [16, 64, 128])
def test_groups_smaller_and_larger_than_a_step(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_quantized_blocks(monkeypatch, k=k)
    case = fixed_k(3, 2, 1, dim=64, hidden=32)
    check(case, quantize_case(case, "w4a16", 32, symmetric=False))
    case = make_case([0, 1], [1, 0], top_k=1, num_tokens=2, num_experts=2, dim=64, hidden=64)
    check(case, quantize_case(case, "w4a16", 64))


def test_narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_quantized_blocks(monkeypatch, n=16)
    case = fixed_k(10, 2, 2, dim=19, hidden=21)
    for scheme in ("w4a16", "fp8"):
        check(case, quantize_case(case, scheme))


def test_up_and_down_may_have_groups_of_their_own() -> None:
    case = fixed_k(5, 3, 2, dim=64, hidden=48)
    up, down = quantize_case(case, "w4a16", None), quantize_case(with_tensors(case), "w4a16", None)
    up = quantize_case(with_tensors(case, w_down_EDF=torch.randn(3, 64, 64)), "w4a16", 64)
    check(case, Pair(up=up.up, down=down.down))


def test_fp8_is_near_the_exact_ffn() -> None:
    case = fixed_k(8, 2, 1, dim=64, hidden=32)
    exact = expect(case)["y"]
    for group_size in (None, 128):
        error = run_quantized(case, quantize_case(case, "fp8", group_size)).double() - exact
        relative = (error.square().mean() / exact.square().mean()).sqrt()
        assert 0.005 < relative < 0.08, "four roundings of about 2.5 % each; next to none would be no fp8"


def test_scales_in_another_dtype() -> None:
    case = fixed_k(5, 3, 2, dim=64, hidden=32)
    pair = quantize_case(with_tensors(case, w_up_EHD=case.w_up_EHD.bfloat16()), "w4a16", 32)
    assert pair.up.scale.dtype == torch.bfloat16
    check(case, pair)
    fp8 = quantize_case(case, "fp8")
    check(case, Pair(up=replace(fp8.up, scale=fp8.up.scale.bfloat16()), down=fp8.down))


def test_repeats_bit_for_bit() -> None:
    case = fixed_k(7, 3, 2, dim=37, hidden=21)
    for scheme in ("w4a16", "fp8"):
        pair = quantize_case(case, scheme)
        first = run_quantized(case, pair)
        run_quantized(fixed_k(3, 3, 1, dim=37, hidden=21, seed=3), pair)
        assert torch.equal(run_quantized(case, pair), first), scheme


def test_a_bad_token_spoils_no_other() -> None:
    case = fixed_k(11, 2, 1, dim=19, hidden=7)
    for scheme in ("w4a16", "fp8"):
        pair = quantize_case(case, scheme)
        good = run_quantized(case, pair)
        bad_TD = case.x_TD.clone()
        bad_TD[4, 3] = torch.nan
        got = run_quantized(with_tensors(case, x_TD=bad_TD), pair)
        assert got[4].isnan().all()
        others = torch.arange(11) != 4
        assert torch.equal(got[others], good[others])


def test_non_contiguous_inputs() -> None:
    case = fixed_k(5, 2, 1, dim=64, hidden=32)
    wide_TD = torch.randn(5, 128)
    wide_TD[:, ::2] = case.x_TD
    for scheme in ("w8a16", "fp8"):
        pair = quantize_case(case, scheme)
        strided = replace(pair.up, packed=pair.up.packed.transpose(1, 2).contiguous().transpose(1, 2))
        got = run_quantized(with_tensors(case, x_TD=wide_TD[:, ::2]), Pair(up=strided, down=pair.down))
        assert_close(scheme, got, run_quantized(case, pair), torch.float32)


def test_who_asks_for_a_gradient_is_told() -> None:
    case = fixed_k(5, 3, 2, dim=8, hidden=8)
    pair = quantize_case(case, "w4a16")
    case.x_TD.requires_grad_()
    y_TD = run_quantized(case, pair)
    with pytest.raises(RuntimeError, match=r"no backward: quantised experts are for inference.*torch.no_grad\(\)"):
        y_TD.sum().backward()
    with torch.no_grad():
        assert not run_quantized(case, pair).requires_grad
    with torch.inference_mode():
        assert torch.equal(run_quantized(case, pair), y_TD)


def test_only_one_expert_is_dequantised_at_a_time(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "moe.kernels.quantized.dequantize", lambda weight, dtype: seen.append(weight.shape) or dequantize(weight, dtype)
    )
    case = fixed_k(9, 4, 2, dim=8, hidden=8)
    run_quantized(case, quantize_case(case, "w4a16"))
    if implementation == "triton":
        assert not seen
    else:
        assert {shape[0] for shape in seen} == {1}


def test_weights_that_do_not_fit() -> None:
    case = fixed_k(5, 3, 2, dim=8, hidden=8)
    pair, other = quantize_case(case, "w4a16"), quantize_case(case, "fp8")
    routing = routing_of(case, case.weights_N)
    with pytest.raises(ValueError, match=r"up has scheme 'w4a16', down 'fp8'"):
        ops.expert_ffn_quantized(case.x_TD, routing, pair.up, other.down, "swiglu")
    with pytest.raises(ValueError, match=r"up \(3, 16, 8\) and down \(3, 8, 8\) do not fit each other with gelu"):
        ops.expert_ffn_quantized(case.x_TD, routing, pair.up, pair.down, "gelu")
    with pytest.raises(ValueError, match=r"x of width 7"):
        ops.expert_ffn_quantized(case.x_TD[:, :7], routing, pair.up, pair.down, "swiglu")
    with pytest.raises(ValueError, match=r"activation='relu'.*'swiglu' or 'gelu'"):
        ops.expert_ffn_quantized(case.x_TD, routing, pair.up, pair.down, "relu")


def test_the_door(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = fixed_k(5, 3, 2, dim=8, hidden=8)
    pair = quantize_case(case, "fp8")
    monkeypatch.setattr(triton_quantized_ops, "problem", lambda device_type, scheme: f"no {scheme} here")
    if implementation == "triton":
        with pytest.raises(ValueError, match="MOE_KERNELS='triton' cannot run: no fp8 here"):
            run_quantized(case, pair)
    else:
        run_quantized(case, pair)
    monkeypatch.delenv("MOE_KERNELS")
    monkeypatch.setattr(ops, "_triton_problem", lambda device_type, dtype: None)
    ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="fused kernels are not used, plain torch is: no fp8 here"):
        assert ops.chosen("cuda", torch.bfloat16, "fp8") == "grouped"
    assert ops.chosen("cuda", torch.bfloat16) == "triton", "other ops are not concerned"


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_card_that_has_it(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    problem = triton_quantized_ops.problem("cuda", "fp8")
    assert (problem is None) == runs
    assert runs or "fp8 needs compute capability 8.9, this card has 8.0" in problem
    assert triton_quantized_ops.problem("cuda", "w4a16") is None
    assert triton_quantized_ops.problem("cpu", "fp8") is None
