"""One layer: experts are rounded in parts as they are together, and what is left alone keeps its dtype."""

from pathlib import Path

import pytest
import torch
from quant.quantize_case import WINDOWS, stock_folder

from moe.quant import step as module_of_step
from moe.quant.balance import expert_tokens
from moe.quant.inputs import LayerInputs
from moe.quant.options import QuantOptions
from moe.quant.step import Step, quantize_layer, weights_of
from moe.quant.walk import QuantWalk


def quantized(folder: Path, **options: object) -> Step:
    """The first layer."""
    source = stock_folder(folder, "glm4_moe-whole", torch.bfloat16)
    walk = QuantWalk(source)
    stored = walk.stored(0)
    module = walk.load(0, stored)
    seen = walk.run(0, walk.embed(WINDOWS), WINDOWS, note_linear=True, note_ffn=True)
    assert seen.ffn_TD is not None and seen.routed is not None
    tokens = expert_tokens(seen.ffn_TD, seen.routed, len(seen.ffn_TD), 0.0)
    chosen = QuantOptions(**({"scheme": "w4a16", "group_size": 0} | options))  # type: ignore[arg-type]
    return quantize_layer(
        module,
        LayerInputs(linear=seen.linear, ffn_TD=seen.ffn_TD, tokens_e=tokens.tokens_e, weights_e=tokens.weights_e),
        chosen,
        chosen.resolved(),
        {name: tensor.dtype for name, tensor in stored.items()},
        torch.bfloat16,
        torch.bfloat16,
    )


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_experts_in_parts_are_experts_together(rounding: str, tmp_path: Path) -> None:
    """Large banks are rounded some experts at a time, which must not show."""
    whole = quantized(tmp_path, rounding=rounding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_step, "_STACK_BYTES", 3 * 4 * 16 * 16)
        parts = quantized(tmp_path, rounding=rounding)
    assert whole.layer.rounded["mlp.experts.gate_up_proj"].codes.shape == (8, 16, 16)
    for name, expected in whole.layer.rounded.items():
        got = parts.layer.rounded[name]
        assert got.codes.shape == expected.codes.shape
        assert (got.codes != expected.codes).float().mean() < 0.01, name  # products of other sizes round otherwise
        torch.testing.assert_close(got.scales.scale, expected.scales.scale)
    for got, expected in zip(parts.matrices, whole.matrices, strict=True):
        assert got.error == pytest.approx(expected.error, rel=0.05)
        assert got.worst_expert == expected.worst_expert


def test_what_is_not_rounded_is_as_it_was(tmp_path: Path) -> None:
    """Router and norms keep their values and dtypes, a selection bias fp32; only a router that is rounded is stored in fp32."""
    made = quantized(tmp_path)
    stored = QuantWalk(stock_folder(tmp_path, "glm4_moe-whole", torch.bfloat16)).stored(0)
    assert made.layer.rest.keys() | made.layer.rounded.keys() == stored.keys()
    for name, tensor in made.layer.rest.items():
        assert torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype, name
    assert made.layer.rest["mlp.router.bias_E"].dtype == torch.float32
    assert made.layer.rest["mlp.router.weight"].dtype == torch.bfloat16
    assert weights_of(made.layer).keys() == stored.keys()
    for align_router in (False, True):
        router = quantized(tmp_path, scheme="w4a4", align_router=align_router).layer.rest["mlp.router.weight"]
        assert router.dtype == torch.float32
        assert all(len(row.unique()) <= 256 for row in router)
        assert 0 < (router - stored["mlp.router.weight"].float()).norm() < 0.1 * router.norm()
