"""`QuantizedExpertBank` in the place of an `ExpertBank`."""

import copy

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import make_layer
from helpers.quantized_case import DEVICE, small_quantized_blocks

from moe.experts import ExpertBank
from moe.kernels.quantized import dequantize
from moe.layer import MoELayer
from moe.quantized_experts import QuantizedExpertBank

D, F = 32, 64
SCHEMES = [("w4a16", 32, True), ("w4a16", 32, False), ("w8a16", None, True), ("fp8", None, True), ("fp8", 128, True)]


def layers(scheme: str, group_size: int | None, symmetric: bool, **values: object) -> tuple[MoELayer, MoELayer]:
    """A layer with quantised experts, and one whose bank holds the same values dequantised."""
    layer = make_layer(D, expert_hidden=F, **values).eval()
    plain = copy.deepcopy(layer)
    layer.experts = QuantizedExpertBank.from_bank(layer.experts, scheme, group_size, symmetric)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(plain.experts, name).copy_(dequantize(layer.experts.weight(name), torch.float32))
    return layer, plain


@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), SCHEMES)
@pytest.mark.parametrize("router", ["topk", "expert_choice", "soft"])
@torch.no_grad()
def test_in_a_layer(router: str, scheme: str, group_size: int | None, symmetric: bool) -> None:
    layer, plain = layers(scheme, group_size, symmetric, router={"name": router})
    x = torch.randn(2, 5, D)
    if scheme == "fp8":  # rounds activations too
        error = (layer(x) - plain(x)).square().mean().sqrt() / plain(x).square().mean().sqrt()
        assert 0.002 < error < 0.08
    else:
        assert_close("y", layer(x), plain(x), torch.float32)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), SCHEMES)
@torch.no_grad()
def test_state_round_trip(scheme: str, group_size: int | None, symmetric: bool, activation: str) -> None:
    first, _ = layers(scheme, group_size, symmetric, activation=activation)
    second, _ = layers(scheme, group_size, symmetric, activation=activation)
    x = torch.randn(3, D)
    assert not torch.equal(second.experts(x, first.router(x)), first.experts(x, first.router(x)))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))
    keys = {"gate_up_proj_packed", "gate_up_proj_scale", "down_proj_packed", "down_proj_scale"}
    if not symmetric:
        keys |= {"gate_up_proj_zero_point", "down_proj_zero_point"}
    assert first.experts.state_dict().keys() == keys
    assert not list(first.experts.parameters())


def test_other_groups_do_not_load() -> None:
    (first, _), (second, _) = layers("w4a16", 32, True), layers("w4a16", None, True)
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.down_proj_scale"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), SCHEMES)
@torch.no_grad()
def test_conversions_of_dtype_leave_codes_and_scales_alone(
    scheme: str, group_size: int | None, symmetric: bool
) -> None:
    layer, _ = layers(scheme, group_size, symmetric)
    before = {name: buffer.clone() for name, buffer in layer.experts.named_buffers()}
    x = torch.randn(4, D)
    y = layer(x)
    layer.to(torch.bfloat16)
    for name, buffer in layer.experts.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer(x.bfloat16()).float() - y).square().mean() < 0.05 * y.square().mean()
    layer.to("meta")
    assert {buffer.device.type for buffer in layer.experts.buffers()} == {"meta"}
    assert layer.experts.weight("down_proj").shape == (4, D, F)


@torch.no_grad()
def test_memory() -> None:
    bank = ExpertBank(4, 128, 256, "swiglu")
    bank.reset_parameters(0.02)
    bank.to(torch.bfloat16)
    whole = sum(p.numel() * p.itemsize for p in bank.parameters())
    for scheme, group_size, share in (
        ("w4a16", 128, 0.258),
        ("w8a16", None, 0.506),
        ("fp8", None, 0.512),
        ("fp8", 128, 0.5002),
    ):
        quantized = QuantizedExpertBank.from_bank(bank, scheme, group_size)
        held = sum(b.numel() * b.itemsize for b in quantized.buffers())
        assert quantized.num_bytes == held
        assert held / whole == pytest.approx(share, abs=0.002), scheme


@torch.no_grad()
def test_under_autocast() -> None:
    layer, plain = layers("w4a16", 32, True)
    x = torch.randn(7, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = layer.experts(x, layer.router(x)), plain.experts(x, plain.router(x))
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_close("y", got, expected.float(), torch.bfloat16)


def test_training_through_it_is_an_error() -> None:
    layer, _ = layers("w8a16", None, True)
    with pytest.raises(RuntimeError, match="quantised experts are for inference"):
        layer(torch.randn(3, D)).sum().backward()


def test_names_and_sizes() -> None:
    layer, _ = layers("w4a16", 32, True)
    assert layer.experts.num_experts == 4
    assert "num_experts=4, dim=32, hidden=64, activation=swiglu, scheme=w4a16, group_size=32" in repr(layer.experts)


@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
@torch.no_grad()
def test_compiled_with_the_fused_kernels(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison: a stand-in for the torch module is not traceable
    monkeypatch.setenv("MOE_KERNELS", "triton")
    small_quantized_blocks(monkeypatch)
    torch.compiler.reset()
    layer = layers(scheme, None, True)[0].to(DEVICE)
    x = torch.randn(2, 5, D, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # inductor would need a C++ compiler
    assert_close("y", compiled(x), layer(x), torch.float32)


def used(layer: MoELayer) -> bool:
    """Whether the weights have left the checkpoint's layout."""
    return layer.experts.gate_up_proj_packed is None


@pytest.mark.parametrize("scheme", [("w4a16", 32, False), ("w8a16", None, True)])
@torch.no_grad()
def test_on_cpu_weights_take_another_layout_and_their_state_does_not(scheme: tuple[str, int | None, bool]) -> None:
    layer, plain = layers(*scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    num_bytes = layer.experts.num_bytes
    x = torch.randn(9, D).bfloat16()
    expected = plain.bfloat16()(x)
    layer.router.bfloat16()
    got = layer(x)
    assert_close("y", got, expected.float(), torch.bfloat16)
    assert used(layer)
    assert layer.experts.num_bytes < 1.6 * num_bytes, "both layouts would be twice"
    assert torch.equal(layer(x), got)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before if "experts" in name)
    assert torch.equal(layer.experts.weight("down_proj").packed, before["experts.down_proj_packed"])
    assert used(layer), "asking for it does not change it"
    assert torch.equal(copy.deepcopy(layer)(x), got)
    other, _ = layers(*scheme)
    other.router.bfloat16()
    assert not torch.equal(other(x), got)
    other.load_state_dict(after)
    assert torch.equal(other(x), got)
    layer.to(torch.bfloat16)
    assert not used(layer), "what moves it finds the checkpoint's layout"
    assert torch.equal(layer(x), got)


@torch.no_grad()
def test_other_implementations_get_the_checkpoints_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layers("w4a16", 32, True)
    x = torch.randn(4, D)
    y = layer(x)
    assert used(layer)
    monkeypatch.setenv("MOE_KERNELS", "reference")
    assert_close("y", layer(x), y, torch.float32)
    assert not used(layer)
