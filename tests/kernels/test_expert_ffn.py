"""`ops.expert_ffn` of each implementation against the float64 double loop: output and every gradient."""

import itertools

import pytest
import torch
from helpers.close import assert_close
from helpers.ffn_case import GRADIENTS, check, expect, fixed_k, forward, make_case, routing_of, run, with_tensors
from helpers.triton_blocks import small_blocks

from moe.kernels import grouped, ops, reference


@pytest.fixture(autouse=True, params=["reference", "grouped", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOE_KERNELS", request.param)
    if request.param == "triton":
        small_blocks(monkeypatch)
    return request.param


SHAPES = {
    "even": lambda **kw: fixed_k(16, 4, 2, dim=8, hidden=8, **kw),
    "aligned": lambda **kw: fixed_k(9, 3, 2, dim=32, hidden=16, **kw),
    "odd": lambda **kw: fixed_k(13, 5, 3, dim=7, hidden=3, **kw),
    "all_experts": lambda **kw: fixed_k(3, 3, 3, dim=1, hidden=1, **kw),
    "one_token": lambda **kw: fixed_k(1, 4, 2, **kw),
    "one_expert_exists": lambda **kw: fixed_k(5, 1, 1, **kw),
    "all_to_one": lambda **kw: make_case(list(range(9)), [3] * 9, top_k=1, num_tokens=9, num_experts=5, **kw),
    "empty_experts": lambda **kw: make_case(
        [0, 0, 1, 1, 2, 2], [1, 4, 4, 1, 1, 4], top_k=2, num_tokens=3, num_experts=6, **kw
    ),
    "variable": lambda **kw: make_case([0, 0, 0, 2, 3, 3, 6], [2, 0, 1, 2, 2, 4, 0], num_tokens=8, num_experts=5, **kw),
    "unordered": lambda **kw: make_case([4, 1, 0, 4, 1, 4], [0, 0, 1, 1, 2, 2], num_tokens=5, num_experts=3, **kw),
    "duplicates": lambda **kw: make_case([1, 1, 0, 1, 0], [2, 2, 2, 0, 2], num_tokens=3, num_experts=3, **kw),
    "duplicates_fixed_k": lambda **kw: make_case(
        [0, 0, 1, 1], [2, 2, 0, 2], top_k=2, num_tokens=2, num_experts=3, **kw
    ),
    "no_assignments": lambda **kw: make_case([], [], num_tokens=4, num_experts=3, **kw),
    "no_tokens": lambda **kw: make_case([], [], num_tokens=0, num_experts=3, **kw),
    "no_tokens_fixed_k": lambda **kw: make_case([], [], top_k=2, num_tokens=0, num_experts=3, **kw),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape: str) -> None:
    check(SHAPES[shape]())


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("gelu", torch.float32), ("swiglu", torch.bfloat16), ("gelu", torch.bfloat16)],
    ids=["gelu-fp32", "swiglu-bf16", "gelu-bf16"],
)
@pytest.mark.parametrize("shape", ["aligned", "odd", "variable", "no_assignments"])
def test_activations_and_dtypes(shape: str, activation: str, dtype: torch.dtype) -> None:
    check(SHAPES[shape](activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_other_dtypes(dtype: torch.dtype, implementation: str) -> None:
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("refused; see test_ops.py")
    case = SHAPES["odd"](dtype=dtype)
    got, expected = run(case), expect(case)
    for name, value in expected.items():
        # Combine weights are fp32 by contract, and so is their gradient.
        assert_close(name, got[name], value, torch.float32 if name == "dweights" and dtype.itemsize > 4 else dtype)


def test_larger_than_a_vector_and_a_block() -> None:
    check(fixed_k(24, 2, 2, dim=33, hidden=17))


def test_zero_weights() -> None:
    case = SHAPES["odd"]()
    case.weights_N[::2] = 0
    check(case)
    assert run(case)["dweights"][::2].abs().min() > 0, "a zero weight has a gradient"
    check(with_tensors(case, weights_N=torch.zeros_like(case.weights_N)))


def test_negative_and_large_weights() -> None:
    case = SHAPES["variable"]()
    check(with_tensors(case, weights_N=case.weights_N * torch.tensor([-1.0, 50, 1, -3, 0, 1, 2])))


def test_saturated_activations() -> None:
    case = SHAPES["odd"]()
    check(with_tensors(case, w_up_EHD=case.w_up_EHD * 50))


def test_non_contiguous_inputs() -> None:
    case = SHAPES["odd"]()
    expected = run(case)
    wide_TD = torch.randn(case.x_TD.shape[0], 2 * case.x_TD.shape[1])
    wide_TD[:, ::2] = case.x_TD
    strided = with_tensors(
        case,
        x_TD=wide_TD[:, ::2],
        dy_TD=case.dy_TD.T.contiguous().T,
        weights_N=torch.stack([case.weights_N, case.weights_N], 1)[:, 0],
        w_up_EHD=case.w_up_EHD.transpose(1, 2).contiguous().transpose(1, 2),
    )
    leaves = [strided.x_TD, strided.weights_N, strided.w_up_EHD, strided.w_down_EDF]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # keeps the strides, unlike a clone
    assert not leaves[0].is_contiguous()
    assert not leaves[2].is_contiguous()
    y_TD = forward(strided, leaves)
    y_TD.backward(strided.dy_TD)
    assert_close("y", y_TD, expected["y"], torch.float32)
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        assert_close(name, leaf.grad, expected[name], torch.float32)


def test_expanded_dy() -> None:
    case = SHAPES["odd"]()
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    forward(case, leaves).sum().backward()  # dy is one number, expanded
    expected = expect(with_tensors(case, dy_TD=torch.ones_like(case.dy_TD)))
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        assert_close(name, leaf.grad, expected[name], torch.float32)


@pytest.mark.parametrize(
    "needs", [needs for needs in itertools.product([True, False], repeat=4) if sum(needs) < 2 or needs[0] == needs[2]]
)
def test_frozen_inputs(needs: tuple[bool, bool, bool, bool]) -> None:
    case = SHAPES["empty_experts"]()
    expected, got = expect(case), run(case, needs)
    assert_close("y", got["y"], expected["y"], torch.float32)
    for name, need in zip(GRADIENTS, needs, strict=True):
        if need:
            assert_close(name, got[name], expected[name], torch.float32)
        else:
            assert got[name] is None, name


def test_inputs_are_not_changed() -> None:
    case = SHAPES["odd"]()
    before = case.leaves()
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    dy_TD = case.dy_TD.clone()
    forward(case, leaves).backward(dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert torch.equal(dy_TD, case.dy_TD)


def test_repeats_bit_for_bit_whatever_ran_before() -> None:
    large, small = fixed_k(18, 2, 2, dim=16, hidden=12), SHAPES["odd"]()
    first = {"large": run(large), "small": run(small)}
    for name in ("large", "small"):
        again = run({"large": large, "small": small}[name])
        for key, value in first[name].items():
            assert torch.equal(again[key], value), (name, key)


@pytest.mark.parametrize("last_first", [True, False])
def test_backward_after_both_forwards(last_first: bool) -> None:
    cases = [fixed_k(9, 3, 2, seed=1), fixed_k(12, 3, 2, seed=2)]
    expected = [run(case) for case in cases]
    leaves = [[leaf.requires_grad_() for leaf in case.leaves()] for case in cases]
    outputs = [forward(case, own) for case, own in zip(cases, leaves, strict=True)]
    for i in (1, 0) if last_first else (0, 1):
        outputs[i].backward(cases[i].dy_TD)
    for i, case_leaves in enumerate(leaves):
        assert torch.equal(outputs[i], expected[i]["y"])
        for name, leaf in zip(GRADIENTS, case_leaves, strict=True):
            assert torch.equal(leaf.grad, expected[i][name]), (i, name)


def test_two_layers_in_one_graph() -> None:
    case = fixed_k(12, 4, 2, dim=6, hidden=5)
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    forward(case, [forward(case, leaves), *leaves[1:]]).backward(case.dy_TD)

    y_TD = run(case)["y"]
    outer = run(with_tensors(case, x_TD=y_TD))
    inner = run(with_tensors(case, dy_TD=outer["dx"]))
    assert_close("dx", leaves[0].grad, inner["dx"], torch.float32)
    for name, leaf in zip(GRADIENTS[1:], leaves[1:], strict=True):
        assert_close(name, leaf.grad, outer[name] + inner[name], torch.float32)


def test_inference_then_training_then_inference() -> None:
    case = SHAPES["odd"]()
    with torch.inference_mode():
        first_TD = forward(case, case.leaves())
    expected = run(case)
    with torch.inference_mode():
        last_TD = forward(case, case.leaves())
    assert torch.equal(first_TD, expected["y"])
    assert torch.equal(last_TD, expected["y"])


def test_under_autocast_the_given_dtype_rules() -> None:
    case = SHAPES["odd"](dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(case)


def test_gradcheck(implementation: str) -> None:
    if implementation == "triton":
        pytest.skip("no float64 there; test_output_and_gradients compares with the oracle's")
    case = make_case(
        [0, 0, 2, 1, 2], [1, 0, 0, 1, 0], num_tokens=4, num_experts=3, dim=3, hidden=2, dtype=torch.float64
    )
    x_TD, _, w_up_EHD, w_down_EDF = (leaf.requires_grad_() for leaf in case.leaves())
    for activation in ("swiglu", "gelu"):
        up_EHD = w_up_EHD if activation == "swiglu" else w_up_EHD.detach()[:, :2].clone().requires_grad_()

        def call(
            x_TD: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: str = activation
        ) -> torch.Tensor:
            return ops.expert_ffn(x_TD, routing_of(case, case.weights_N), up, down, activation)

        assert torch.autograd.gradcheck(call, (x_TD, up_EHD, w_down_EDF))


def test_gradcheck_of_the_weights(implementation: str) -> None:
    if implementation != "reference":
        pytest.skip("combine weights are fp32 there; test_output_and_gradients covers their gradient")
    case = make_case([0, 0, 2], [1, 0, 1], num_tokens=3, num_experts=2, dim=3, hidden=2, dtype=torch.float64)
    weights_N = case.weights_N.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: reference.expert_ffn(case.x_TD, routing_of(case, w), case.w_up_EHD, case.w_down_EDF, "swiglu"),
        weights_N,
    )


def test_backward_keeps_nothing_of_size_n_times_d(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("it keeps what autograd needs")
    case = fixed_k(10, 4, 3, dim=64, hidden=2)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward(case, [leaf.requires_grad_() for leaf in case.leaves()])
    assert saved
    assert all(tensor.shape != (30, 64) for tensor in saved)


def test_bags_are_the_way_back() -> None:
    case = SHAPES["variable"]()
    order = grouped.sort_by_expert(routing_of(case, case.weights_N))
    experts = [case.expert_ids[n] for n in order.order_N.tolist()]
    assert experts == sorted(case.expert_ids)
    assert order.blocks == [(0, 0, 2), (1, 2, 3), (2, 3, 6), (4, 6, 7)]
    tokens = [case.token_ids[order.order_N[p]] for p in order.bags_N.tolist()]
    assert tokens == sorted(case.token_ids)
    assert order.bag_offsets_T.tolist() == [0, 3, 3, 4, 6, 6, 6, 7]


def test_sorts_more_experts_than_16_bits_hold() -> None:
    case = make_case([0, 1, 2], [40_000, 7, 32_768], num_tokens=3, num_experts=2)
    routing = routing_of(with_tensors(case), case.weights_N)
    object.__setattr__(routing, "num_experts", 40_001)
    order = grouped.sort_by_expert(routing)
    assert order.blocks == [(7, 0, 1), (32_768, 1, 2), (40_000, 2, 3)]
    assert order.order_N.tolist() == [1, 2, 0]
