"""The tolerance table must catch wrong kernels, or no other test means anything."""

import pytest
import torch
from helpers.close import TOLERANCES, assert_close
from helpers.ffn_case import expect, make_case, run

T, K, E = 64, 2, 4
TOKENS = [t for t in range(T) for _ in range(K)]
EXPERTS = [(t + k) % E for t in range(T) for k in range(K)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_catches_one_wrong_row_or_weight(dtype: torch.dtype) -> None:
    case = make_case(TOKENS, EXPERTS, top_k=K, num_tokens=T, num_experts=E, dtype=dtype)
    got, expected = run(case), expect(case)
    for name, value in got.items():
        assert value is not None
        assert_close(name, value, expected[name], dtype)
        broken = value.clone()
        sizes = value.flatten(1).norm(dim=1) if value.dim() > 1 else value.abs()
        broken[sizes.argsort()[len(sizes) // 2]] = 0  # the median row
        with pytest.raises(AssertionError, match=f"{name}: "):
            assert_close(name, broken, expected[name], dtype)
    with pytest.raises(AssertionError, match="dw_down: missing"):
        assert_close("dw_down", None, expected["dw_down"], dtype)
    no_sum_over_k = torch.zeros_like(expected["y"])
    for n in range(1, T * K, K):  # a kernel that stores where it should add
        no_sum_over_k[TOKENS[n]] = expected["y"][TOKENS[n]] / K
    with pytest.raises(AssertionError, match="y: "):
        assert_close("y", no_sum_over_k, expected["y"], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_catches_nan_bias_and_shape(dtype: torch.dtype) -> None:
    expected = torch.randn(50, 3, dtype=torch.float64)
    assert_close("same", expected.to(dtype), expected, dtype)
    for wrong in (expected * torch.nan, expected * (1 + 2 * TOLERANCES[dtype].rms), expected[:, :1]):
        with pytest.raises(AssertionError, match="wrong: "):
            assert_close("wrong", wrong, expected, dtype)
    with pytest.raises(AssertionError, match="zeros: "):
        assert_close("zeros", torch.full((3,), 1e-30), torch.zeros(3), dtype)
