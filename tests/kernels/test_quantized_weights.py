"""How quantised weights are stored, and how far rounding moves a weight."""

from dataclasses import replace

import pytest
import torch

from moe.kernels.quantized import (
    QuantizedWeight,
    dequantize,
    pack_int32,
    quantize_rows,
    quantize_weight,
    unpack_int32,
)

INTEGERS = [
    (scheme, group_size, symmetric)
    for scheme in ("w4a16", "w8a16")
    for group_size in (None, 32, 64, 128)
    for symmetric in (True, False)
]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different size, none centred."""
    sizes = torch.logspace(-1, 2, shape[1])[:, None]
    return ((torch.randn(shape) + 0.5) * sizes).to(dtype)


def test_four_bits_are_packed_as_compressed_tensors_does() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7, 0, -8]])
    # Eight to a word, first one lowest, 8 added; the last word is filled with zero bits.
    expected = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32, 0x08F]], dtype=torch.int32)
    assert torch.equal(pack_int32(codes, 4), expected)
    assert torch.equal(unpack_int32(expected, 4, 19), codes.to(torch.int8))


def test_eight_bits_are_packed_as_compressed_tensors_does() -> None:
    codes = torch.tensor([[-128, -127, 0, 127, 5]])
    expected = torch.tensor([[0xFF800100 - 2**32, 0x85]], dtype=torch.int32)
    assert torch.equal(pack_int32(codes, 8), expected)
    assert torch.equal(unpack_int32(expected, 8, 5), codes.to(torch.int8))


def test_zero_points_are_packed_along_the_rows() -> None:
    zeros_PG = torch.tensor([[-8, 7], [-7, 6], [0, 0]])
    expected = torch.tensor([[0x810, 0x8EF]], dtype=torch.int32)
    assert torch.equal(pack_int32(zeros_PG, 4, dim=0), expected)
    assert torch.equal(unpack_int32(expected, 4, 3, dim=0), zeros_PG.to(torch.int8))


def test_a_weight_by_hand() -> None:
    weight = torch.tensor([[[-7.5, 7.5, 0.4, 0.6, 1.0, 2.0, 3.4, -2.6]]])  # scale 1
    got = quantize_weight(weight, "w4a16")
    assert got.scale.item() == 1.0
    assert got.zero_point is None
    assert unpack_int32(got.packed, 4, 8).tolist() == [[[-8, 7, 0, 1, 1, 2, 3, -3]]]
    weight = torch.tensor([[[-1.0, 14.0, 0.0, 3.2]]])  # scale 1, zero at code -7
    got = quantize_weight(weight, "w4a16", symmetric=False)
    assert unpack_int32(got.packed, 4, 4).tolist() == [[[-8, 7, -7, -4]]]
    assert unpack_int32(got.zero_point, 4, 1, dim=1).tolist() == [[[-7]]]
    assert dequantize(got, torch.float32).tolist() == [[[-1.0, 14.0, 0.0, 3.0]]]


@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), INTEGERS)
def test_the_same_tensors_as_compressed_tensors(scheme: str, group_size: int | None, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    weight_EPQ = weights(2, 21, 256)  # fp32: in bf16 its division rounds to bf16, ours does not
    got = quantize_weight(weight_EPQ, scheme, group_size, symmetric)
    args = QuantizationArgs(
        num_bits=int(scheme[1]),
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    for e in range(2):
        groups = weight_EPQ[e].unflatten(1, (-1, group_size or 256))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight_EPQ[e], "weight_scale": scale, "weight_zero_point": zero_point}
        theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        assert torch.equal(got.packed[e], theirs["weight_packed"])
        assert torch.equal(got.scale[e], theirs["weight_scale"])
        if symmetric:
            assert got.zero_point is None
        else:
            assert torch.equal(got.zero_point[e], theirs["weight_zero_point"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), INTEGERS)
def test_integers_are_within_half_a_step(
    scheme: str, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = weights(3, 13, 256, dtype=dtype)
    got = quantize_weight(weight, scheme, group_size, symmetric)
    step = got.scale.double().repeat_interleave(256 // got.scale.shape[2], 2)
    error = (dequantize(got, torch.float64) - weight.double()).abs()
    # A scale rounded to the weight's dtype may end the range before the largest values do.
    bound = 0.5 * step + weight.double().abs() * torch.finfo(dtype).eps
    if not symmetric:  # rounding the zero point moves the range by another half step at its ends
        bound += 0.5 * step
    assert (error <= bound * 1.0001).all()
    assert (error.square().mean() / step.square().mean()).sqrt() < 0.32, "uniform rounding: 0.29 steps"


@pytest.mark.parametrize("group_size", [None, 128])
def test_fp8_is_within_half_a_step(group_size: int | None) -> None:
    weight = weights(2, 140, 300)
    got = quantize_weight(weight, "fp8", group_size)
    size = (140, 1) if group_size is None else (2, 3)
    assert got.scale.shape == (2, *size)
    scale = got.scale.double()
    if group_size:
        scale = scale.repeat_interleave(128, 1)[:, :140].repeat_interleave(128, 2)[:, :, :300]
    error = (dequantize(got, torch.float64) - weight.double()).abs()
    # Three bits of fraction, and a step of 2 ** -9 below 2 ** -6.
    assert (error <= torch.maximum(weight.double().abs() * 2**-4, scale * 2**-10) * 1.0001).all()
    assert got.packed.double().abs().amax((1, 2)).tolist() == [448.0, 448.0]


def test_rounding_what_is_rounded_changes_nothing() -> None:
    weight = dequantize(quantize_weight(weights(2, 9, 64), "fp8"), torch.float32)
    assert torch.equal(dequantize(quantize_weight(weight, "fp8"), torch.float32), weight)


def test_zeros() -> None:
    weight = torch.zeros(1, 8, 64)
    for scheme, symmetric in (("w4a16", True), ("w4a16", False), ("w8a16", True), ("w8a16", False), ("fp8", True)):
        got = quantize_weight(weight, scheme, symmetric=symmetric)
        assert got.scale.gt(0).all(), scheme
        assert torch.equal(dequantize(got, torch.float32), weight), scheme
    codes, scale = quantize_rows(torch.zeros(2, 5))
    assert not codes.float().any()
    assert scale.tolist() == [1.0, 1.0]
    assert quantize_rows(torch.zeros(0, 5))[0].shape == (0, 5)
    assert quantize_rows(torch.zeros(3, 0))[1].shape == (3,)


def test_an_experts_view() -> None:
    whole = quantize_weight(weights(3, 9, 64), "w4a16", 32, symmetric=False)
    for e in range(3):
        one = whole.expert(e)
        assert one.shape == (1, 9, 64)
        assert one.packed.data_ptr() == whole.packed[e].data_ptr()
        assert torch.equal(dequantize(one, torch.float32)[0], dequantize(whole, torch.float32)[e])


def test_bytes() -> None:
    weight = torch.randn(4, 256, 512, dtype=torch.bfloat16)
    bits = {"w4a16": 4 + 16 / 128, "w8a16": 8 + 16 / 128, "fp8": 8 + 32 / 128**2}
    for scheme, expected in bits.items():
        assert quantize_weight(weight, scheme, 128).num_bytes * 8 == expected * weight.numel()


def test_wrong_arguments() -> None:
    weight = torch.randn(2, 4, 96)
    for message, arguments in {
        r"scheme='w2' is unknown.*'w4a16'": ("w2",),
        r"group_size=48 is not offered for w4a16; use one of None, 32": ("w4a16", 48),
        r"group_size=32 is not offered for fp8; use one of None, 128": ("fp8", 32),
        r"group_size=64 does not divide the 96 columns.*divisor": ("w8a16", 64),
        r"symmetric=False is not offered for fp8": ("fp8", None, False),
    }.items():
        with pytest.raises(ValueError, match=message):
            quantize_weight(weight, *arguments)
    with pytest.raises(ValueError, match=r"\(4, 96\).*must be \(E, P, Q\)"):
        quantize_weight(weight[0], "fp8")
    with pytest.raises(ValueError, match=r"torch.int64.*floating point"):
        quantize_weight(weight.long(), "fp8")
    with pytest.raises(ValueError, match=r"nothing to quantise"):
        quantize_weight(weight[:0], "fp8")
    weight[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"weight of expert 1 .*not finite"):
        quantize_weight(weight, "w4a16")


def test_parts_that_do_not_fit() -> None:
    good = quantize_weight(torch.randn(2, 16, 64), "w4a16", 32, symmetric=False)
    assert isinstance(good, QuantizedWeight)
    for name, value in {
        "packed": good.packed[:, :, 1:],
        "scale": good.scale[:, :, :1],
        "zero_point": good.zero_point.long(),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} is \(.*needs \(2, "):
            replace(good, **{name: value})
    with pytest.raises(ValueError, match=r"scale has dtype torch.int32"):
        replace(good, scale=good.scale.int())
    with pytest.raises(ValueError, match=r"scale is on meta, packed on cpu"):
        replace(good, scale=good.scale.to("meta"))
    eight = quantize_weight(torch.randn(2, 16, 64), "fp8")
    with pytest.raises(ValueError, match=r"zero_point is set, but fp8 is symmetric"):
        replace(eight, zero_point=good.zero_point)
