"""Traces: made, saved, recorded from a model, and replayed against counting by hand."""

from pathlib import Path

import pytest
import torch

from moe.layer import MoELayer, MoESpec
from moe.scaling.hardware import HARDWARE
from moe.scaling.replay import replay
from moe.scaling.shape import Layout
from moe.scaling.trace import RoutingTrace, load_trace, recording, synthetic_trace

H100 = HARDWARE["h100"]


def test_replay_counts_rows_by_hand() -> None:
    # 2 ranks of 2 experts; tokens of rank 0: (0, 1) stays, (0, 2) half, (2, 3) goes; rank 1: (0, 1), (0, 1), (3, 2)
    ids = torch.tensor([[0, 1], [0, 2], [2, 3], [0, 1], [0, 1], [3, 2]], dtype=torch.int32)
    trace = RoutingTrace(name="hand", num_experts=4, expert_ids_SYTK=ids[None, None])
    found = replay(trace, Layout(world_size=2, ep_size=2), dim=8, num_tokens=3, hardware=H100)
    # rank 0 gets 2 + 1 + 2 + 2 = 7 of 12 assignments
    assert found.imbalance == pytest.approx(7 / 6)
    assert found.rows_per_token == pytest.approx((2 + 2) / 6)
    rows, assignments, bf16_row = 4, (1 + 2) + (2 + 2), 2 * 8
    # rows travel out and back, and their gradients, too; labels once, weights out and their gradients back; counts
    expected = 4 * rows * bf16_row + assignments * (4 + 4 + 4) + 2 * 16
    assert found.sent.node == pytest.approx(expected / 2)
    assert found.plain.node == pytest.approx((4 * assignments * bf16_row + assignments * 4 + 2 * 16) / 2)
    assert found.sent.network == 0


def test_uniform_is_even_and_zipf_is_not() -> None:
    layout = Layout(world_size=8, ep_size=8)
    even, skewed = (
        replay(synthetic_trace(kind, 32, 4, 8192), layout, 64, 1024, H100) for kind in ("uniform", "zipf:1.2")
    )
    assert even.imbalance < 1.1 < 1.5 < skewed.imbalance
    assert skewed.seconds > even.seconds
    # K different of E experts: 8 * (1 - C(28, 4) / C(32, 4)) distinct ranks, 7 of 8 of them elsewhere
    assert even.rows_per_token == pytest.approx(7 * (1 - 20475 / 35960), rel=0.02)


def test_synthetic_choices_differ_within_a_token() -> None:
    ids_TK = synthetic_trace("zipf:2", 8, 4, 500).expert_ids_SYTK[0, 0]
    assert all(len(set(row)) == 4 for row in ids_TK.tolist())
    with pytest.raises(ValueError, match="neither a file nor uniform or zipf"):
        synthetic_trace("zipf:x", 8, 4, 10)


def test_recorded_choices_are_those_of_the_router(tmp_path: Path) -> None:
    layer = MoELayer(16, MoESpec(num_experts=4, expert_hidden=8)).eval()
    batches = [torch.randn(2, 5, 16) for _ in range(3)]
    with recording(layer) as recorder:
        for x in batches:
            layer(x)
    layer(batches[0])  # after the block nothing is noted
    trace = recorder.trace("layer")
    assert trace.expert_ids_SYTK.shape == (3, 1, 10, 2)
    for ids_TK, x in zip(trace.expert_ids_SYTK[:, 0], batches, strict=True):
        assert torch.equal(ids_TK.long(), layer.router(x.view(-1, 16)).expert_ids_N.view(-1, 2))
    trace.save(tmp_path / "t.safetensors")
    again = load_trace(tmp_path / "t.safetensors")
    assert again.num_experts == 4 and torch.equal(again.expert_ids_SYTK, trace.expert_ids_SYTK)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_trace(tmp_path / "text")
    wrong = RoutingTrace(name="x", num_experts=2, expert_ids_SYTK=torch.full((1, 1, 2, 1), 2, dtype=torch.int32))
    wrong.save(tmp_path / "wrong")
    with pytest.raises(ValueError, match="outside of 0"):
        load_trace(tmp_path / "wrong")
    with pytest.raises(ValueError, match="no MoE layers"), recording(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="does not divide"):
        replay(synthetic_trace("uniform", 6, 2, 10), Layout(world_size=4, ep_size=4), 8, 4, H100)
