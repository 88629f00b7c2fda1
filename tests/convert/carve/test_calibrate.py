"""Layer-by-layer calibration: the same activations as the whole model's, whatever the architecture."""

from functools import partial
from pathlib import Path

import pytest
import torch
from convert.upcycle.sources import LAYERS, logits, make_dense, save_dense, tokens
from torch import Tensor

from moe.convert.carve.calibrate import CalibrationWalk
from moe.convert.carve.neurons import output
from moe.convert.dense import read_ffn
from moe.models.folder import ModelFolder

WINDOWS = tokens(5, 17)
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "olmo2": {},  # norms its FFN's output
    "phi3": {"attention_dropout": 0.0},  # fused projections
}


def walk_through(walk: CalibrationWalk, source: ModelFolder) -> list[Tensor]:
    """The FFN inputs of every layer."""
    found = []
    for layer in range(walk.num_layers):
        found.append(walk.enter(partial(output, read_ffn(source, layer))).x_TD)
        walk.leave()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_layers_one_by_one_are_the_model(kind: str, tmp_path: Path) -> None:
    """FFN inputs, token weights and final logits, from the whole model's hooks."""
    source = ModelFolder(save_dense(tmp_path / "dense", kind, **KINDS[kind]))
    model = make_dense(kind, **KINDS[kind])
    seen: list[Tensor] = []
    streams: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
        layer.register_forward_hook(lambda module, inputs, out: streams.append(out))
    expected = logits(model, WINDOWS)
    walk = CalibrationWalk(source, WINDOWS, batch_size=2)
    for layer in range(LAYERS):
        inputs = walk.enter(partial(output, read_ffn(source, layer)))
        torch.testing.assert_close(inputs.x_TD, seen[layer], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(1 / inputs.weights_T, streams[layer].square().mean(-1).flatten(), rtol=1e-4, atol=0)
        assert inputs.sequence_T.tolist() == [row for row in range(5) for _ in range(17)]
        walk.leave()
    with torch.no_grad():
        got = model.lm_head(model.model.norm(walk.hidden_BLD))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_sequential_calibration_sees_the_other_ffn(kind: str, tmp_path: Path) -> None:
    """Leaving a layer with another FFN is running the model with that FFN there; the layer itself saw the dense one."""
    source, model = ModelFolder(save_dense(tmp_path / "dense", kind)), make_dense(kind)

    def other(x_TD: Tensor) -> Tensor:
        return x_TD.flip(-1) * 0.5

    walk = CalibrationWalk(source, WINDOWS)
    first = walk.enter(partial(output, read_ffn(source, 0)))
    walk.leave(other)
    second = walk.enter(partial(output, read_ffn(source, 1)))
    plain = CalibrationWalk(source, WINDOWS)
    torch.testing.assert_close(plain.enter(partial(output, read_ffn(source, 0))).x_TD, first.x_TD)
    plain.leave()
    assert not torch.allclose(plain.enter(partial(output, read_ffn(source, 1))).x_TD, second.x_TD, atol=1e-2)

    class Other(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return other(x)

    model.model.layers[0].mlp = Other()
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    logits(model, WINDOWS)
    torch.testing.assert_close(second.x_TD, seen[0], atol=1e-5, rtol=1e-4)


def test_bf16_is_near_and_leaves_the_stream_in_fp32(tmp_path: Path) -> None:
    source = ModelFolder(save_dense(tmp_path / "dense"))
    exact, rounded = CalibrationWalk(source, WINDOWS), CalibrationWalk(source, WINDOWS, torch.bfloat16)
    for got, expected in zip(walk_through(rounded, source), walk_through(exact, source), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() > 1e-5, "nothing was rounded"
        assert (got - expected).norm() < 0.03 * expected.norm()
    assert rounded.hidden_BLD.dtype == torch.float32


def test_a_bf16_source_is_computed_in_fp32(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    walk = CalibrationWalk(ModelFolder(folder), WINDOWS)
    assert walk.hidden_BLD.dtype == torch.float32


def test_calls_must_alternate(tmp_path: Path) -> None:
    source = ModelFolder(save_dense(tmp_path / "dense"))
    walk = CalibrationWalk(source, WINDOWS)
    with pytest.raises(AssertionError, match="enter a layer first"):
        walk.leave()
    walk.enter(partial(output, read_ffn(source, 0)))
    with pytest.raises(AssertionError, match="leave the layer first"):
        walk.enter(partial(output, read_ffn(source, 1)))


def test_refusals(tmp_path: Path) -> None:
    source = ModelFolder(save_dense(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"token id 96 is not in the model's vocabulary of 96"):
        CalibrationWalk(source, torch.tensor([[1, 96]]))
    granite = ModelFolder(save_dense(tmp_path / "granite", "granite", embedding_multiplier=12.0))
    with pytest.raises(ValueError, match="'granite' changes its embeddings before the first layer"):
        CalibrationWalk(granite, WINDOWS)
