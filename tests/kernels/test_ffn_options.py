"""`FFNOptions`: less memory, other precision or gradients elsewhere, and the same result."""

from dataclasses import replace

import pytest
import torch
from helpers.close import assert_close
from helpers.ffn_case import Case, expect, fixed_k, forward, make_case, run
from helpers.triton_blocks import small_blocks

from moe.experts import ExpertBank, set_ffn_options
from moe.routers.assemble import routing_of_choices
from moe.types import FFNOptions

CASES = {
    "odd": lambda **kw: fixed_k(13, 5, 3, dim=7, hidden=3, **kw),
    "aligned": lambda **kw: fixed_k(9, 3, 2, dim=32, hidden=16, **kw),
    "variable": lambda **kw: make_case([0, 0, 0, 2, 3, 3, 6], [2, 0, 1, 2, 2, 4, 0], num_tokens=8, num_experts=6, **kw),
    "no_tokens": lambda **kw: make_case([], [], top_k=2, num_tokens=0, num_experts=3, **kw),
}
RECOMPUTE = FFNOptions(recompute=True)


@pytest.fixture(autouse=True, params=["reference", "grouped", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOE_KERNELS", request.param)
    if request.param == "triton":
        small_blocks(monkeypatch)
    return request.param


@pytest.mark.parametrize(("name", "activation"), [*((name, "swiglu") for name in CASES), ("odd", "gelu")])
def test_recomputed_is_the_same(name: str, activation: str) -> None:
    case = CASES[name](activation=activation, dtype=torch.float32)
    kept, made_again = run(case), run(case, options=RECOMPUTE)
    for key, value in kept.items():
        assert torch.equal(made_again[key], value), key


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, False, False, True), (False, True, False, False)]
)
def test_recomputed_for_some_gradients(needs: tuple[bool, bool, bool, bool]) -> None:
    case = CASES["odd"](dtype=torch.float32)
    kept, made_again = run(case, needs), run(case, needs, RECOMPUTE)
    for key, value in kept.items():
        assert (value is None) == (made_again[key] is None), key
        assert value is None or torch.equal(made_again[key], value), key


def test_recomputing_keeps_no_pre_activation(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("autograd keeps what it wants")
    case = CASES["aligned"](dtype=torch.float32)
    num_rows, (_, height, _) = len(case.token_ids), case.w_up_EHD.shape
    sizes = {}
    for options in (FFNOptions(), RECOMPUTE):
        found: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, found=found: found.append(t.numel()) or t, lambda t: t):
            forward(case, [leaf.requires_grad_() for leaf in case.leaves()], options)
        sizes[options.recompute] = sum(found)
    assert sizes[False] - sizes[True] == num_rows * height


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), ("odd", torch.bfloat16)])
def test_gradients_are_added_to_buffers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name](dtype=dtype)
    expected = expect(case)
    start = [torch.randn(weight.shape) for weight in (case.w_up_EHD, case.w_down_EDF)]
    buffers = (start[0].clone(), start[1].clone())
    for step in (1, 2):
        got = run(case, options=FFNOptions(main_grads=buffers))
        assert got["dw_up"] is None and got["dw_down"] is None
        for key in ("y", "dx", "dweights"):
            assert_close(
                key, got[key], expected[key], torch.float32 if key == "dweights" and dtype.itemsize > 4 else dtype
            )
        for key, buffer, before in zip(("dw_up", "dw_down"), buffers, start, strict=True):
            assert_close(f"{key}, {step} times", buffer - before, step * expected[key], dtype)


def test_a_buffer_that_does_not_fit_is_an_error(implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("plain torch adds to any strides")
    case = CASES["aligned"](dtype=torch.float32)
    up_EHD, down_EDF = torch.zeros_like(case.w_up_EHD), torch.zeros_like(case.w_down_EDF)
    for buffers in ((up_EHD, down_EDF[:2]), (up_EHD.transpose(1, 2).contiguous().transpose(1, 2), down_EDF)):
        with pytest.raises(ValueError, match=r"a main_grad is .* the kernels need a contiguous \(3, 32, "):
            run(case, options=FFNOptions(main_grads=buffers))


def test_a_buffer_of_an_expert_without_rows_stays() -> None:
    case: Case = CASES["variable"](dtype=torch.float32)
    idle = sorted(set(range(6)) - set(case.expert_ids))
    assert idle
    buffers = (torch.full_like(case.w_up_EHD, 7.0), torch.full_like(case.w_down_EDF, 7.0))
    run(case, options=FFNOptions(main_grads=buffers))
    for buffer in buffers:
        assert (buffer[idle] == 7).all()
        assert (buffer[case.expert_ids[0]] != 7).any()


def test_recomputing_in_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute=True with fp8=True"):
        FFNOptions(recompute=True, fp8=True)


def test_a_bank_takes_the_options_of_the_run_and_the_buffers_of_its_parameters() -> None:
    torch.manual_seed(0)
    bank = ExpertBank(4, 16, 8, "swiglu")
    bank.reset_parameters(0.3)
    x_TD, ids_TK = torch.randn(6, 16), torch.tensor([[0, 1], [1, 2], [0, 3], [3, 1], [2, 0], [1, 3]])
    routing = routing_of_choices(ids_TK, torch.full((6, 2), 0.5), 4)
    y_TD = bank(x_TD, routing)
    y_TD.square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in bank.named_parameters()}
    bank.zero_grad(set_to_none=True)
    for parameter in bank.parameters():
        parameter.main_grad = torch.ones(parameter.shape)
    set_ffn_options(torch.nn.Sequential(bank), RECOMPUTE)
    assert bank.options == RECOMPUTE
    assert torch.equal(bank(x_TD, routing), y_TD)
    bank(x_TD, routing).square().sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad - 1, plain[name], atol=1e-5, rtol=1e-5)
    set_ffn_options(bank, replace(RECOMPUTE, recompute=False, fp8=True))
    rounded_TD = bank(x_TD, routing)
    assert 0 < (rounded_TD - y_TD).abs().max() < 0.2 * y_TD.abs().max()
