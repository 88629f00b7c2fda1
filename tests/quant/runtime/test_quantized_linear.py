"""`QuantizedLinear` in the place of an `nn.Linear`."""

import pytest
import torch
from helpers.close import assert_close
from helpers.quantized_case import DEVICE, small_quantized_blocks
from torch import nn

from moe.kernels import ops
from moe.kernels.quantized import dequantize, quantize_weight
from moe.quant.runtime import QuantizedLinear

WEIGHTS = [
    ("w4a16", 32, True),
    ("w4a16", None, False),
    ("w8a16", None, True),
    ("w8a16", 32, False),
    ("fp8", None, True),
]


def linears(
    scheme: str, group_size: int | None, symmetric: bool, rows: int = 48, columns: int = 64, bias: bool = True
) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantised linear, and one that holds the same values dequantised."""
    plain = nn.Linear(columns, rows, bias=bias)
    weight = quantize_weight(plain.weight.detach()[None], scheme, group_size, symmetric)
    plain.weight.data.copy_(dequantize(weight, torch.float32)[0])
    return QuantizedLinear(weight, plain.bias), plain


@pytest.mark.parametrize("implementation", ["reference", "grouped", "triton"])
@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), WEIGHTS)
@torch.no_grad()
def test_outputs(
    scheme: str, group_size: int | None, symmetric: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_KERNELS", implementation)
    small_quantized_blocks(monkeypatch)
    device = DEVICE if implementation == "triton" else "cpu"
    quantized, plain = linears(scheme, group_size, symmetric)
    quantized.to(device)
    for shape in ((3, 5, 64), (1, 64), (0, 64), (64,)):
        x = torch.randn(shape)
        got, expected = quantized(x.to(device)).cpu(), plain(x)
        if scheme == "fp8":  # rounds activations too
            assert got.shape == expected.shape
            assert ((got - expected).square().mean() <= 0.003 * expected.square().mean()) or not got.numel()
        else:
            assert_close(str(shape), got, expected, torch.float32)


@torch.no_grad()
def test_odd_sizes() -> None:
    for scheme in ("w4a16", "w8a16"):
        quantized, plain = linears(scheme, None, False, rows=7, columns=19, bias=False)
        x = torch.randn(4, 19).bfloat16()
        assert_close(scheme, quantized(x), plain.bfloat16()(x).float(), torch.bfloat16)


@torch.no_grad()
def test_state_has_the_names_and_shapes_of_a_checkpoint() -> None:
    quantized, _ = linears("w4a16", 32, False)
    shapes = {name: tuple(tensor.shape) for name, tensor in quantized.state_dict().items()}
    expected = {"weight_packed": (48, 8), "weight_scale": (48, 2), "weight_zero_point": (6, 2), "bias": (48,)}
    assert shapes == expected
    x = torch.randn(2, 64).bfloat16()
    y = quantized(x)
    other, _ = linears("w4a16", 32, False)
    other.load_state_dict(quantized.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in quantized.state_dict().items()} == expected
    assert torch.equal(other(x), y)


@torch.no_grad()
def test_under_autocast() -> None:
    quantized, plain = linears("w8a16", None, True)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = quantized(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_close("y", got, expected.float(), torch.bfloat16)


def test_training_through_it_is_an_error() -> None:
    quantized, _ = linears("w4a16", 32, True)
    with pytest.raises(RuntimeError, match="no backward"):
        quantized(torch.randn(2, 64, requires_grad=True)).sum().backward()


def test_rows_that_do_not_fit() -> None:
    quantized, _ = linears("w4a16", 32, True)
    with pytest.raises(ValueError, match=r"weight \(1, 48, 64\) does not fit rows of 32"):
        ops.linear_quantized(torch.randn(2, 32), quantized.weight("weight"))
    assert "in_features=64, out_features=48, bias=True, scheme=w4a16, group_size=32" in repr(quantized)


@torch.no_grad()
def test_compiled_with_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison: a stand-in for the torch module is not traceable
    monkeypatch.setenv("MOE_KERNELS", "triton")
    small_quantized_blocks(monkeypatch)
    torch.compiler.reset()
    quantized = linears("w4a16", 32, True)[0].to(DEVICE)
    x = torch.randn(5, 64, device=DEVICE)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")  # inductor would need a C++ compiler
    assert_close("y", compiled(x), quantized(x), torch.float32)
