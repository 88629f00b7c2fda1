"""`tune-kernels` as far as a machine without a GPU can tell: what is tried, that each call runs, and that its file is read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.triton_blocks import small_blocks

from benchmarks import kernel_tuning
from benchmarks.kernel_tuning import KERNELS, ROWS_PER_EXPERT, calls, candidates, refinements
from moe.kernels import triton_tuning
from moe.kernels.triton_tuning import Blocks, blocks_for


@pytest.mark.parametrize("rows", ROWS_PER_EXPERT)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_tried(kernel: str, rows: str) -> None:
    tried = list(candidates(kernel, rows))
    assert tried[0] == blocks_for(kernel, ROWS_PER_EXPERT[rows], 1, torch.bfloat16)
    assert len(set(tried)) == len(tried) > 10
    others = list(refinements(kernel, tried[1]))
    assert tried[1] in others
    assert {(blocks.m, blocks.n, blocks.k) for blocks in others} == {(tried[1].m, tried[1].n, tried[1].k)}


def test_every_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DIM": 16, "HIDDEN": 16, "NUM_EXPERTS": 2, "ROWS_PER_EXPERT": {"few": 4}}.items():
        monkeypatch.setattr(kernel_tuning, name, value)
    small_blocks(monkeypatch)
    for call in calls("few", torch.device("cuda" if torch.cuda.is_available() else "cpu")).values():
        call()


def test_the_file_of_a_card_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tuning, "TUNED_DIR", tmp_path)
    monkeypatch.setattr(triton_tuning, "_device_name", lambda: "NVIDIA Some/Card")
    triton_tuning._tuned.cache_clear()
    best = Blocks(m=32, n=64, k=64, per_sm=2, tma=False)
    entry = {"kernel": "up", "rows": "many", "sizes": asdict(best), "ms": 1.0}
    (tmp_path / "NVIDIA_Some_Card.json").write_text(json.dumps({"blocks": [entry]}))
    try:
        assert blocks_for("up", 960, 4, torch.bfloat16) == best
        assert blocks_for("up", 960, 4, torch.float32) != best
        assert blocks_for("up", 96, 4, torch.bfloat16) == triton_tuning._HALF["up", "few"]
        assert blocks_for("up", 128, 4, torch.bfloat16) == triton_tuning._HALF["up", "some"]
    finally:
        triton_tuning._tuned.cache_clear()
