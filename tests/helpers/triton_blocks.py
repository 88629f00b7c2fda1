"""Triton kernels on tiny inputs: blocks so small that there are several of them, and what the interpreter rounds worse."""

from dataclasses import replace

import pytest
import torch
import triton

from helpers import close
from moe.kernels import triton_ops, triton_plan
from moe.kernels.triton_tuning import Blocks


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 everywhere."""
    monkeypatch.setattr(triton_ops, "blocks_for", lambda *_: Blocks(m=16, n=16, k=16, group=2, warps=4, stages=2))
    monkeypatch.setattr(triton_plan, "BLOCK", 32)
    if triton.knobs.runtime.interpret:
        # Triton's interpreter cuts fp32 to bf16 instead of rounding it: twice the error on average.
        exact = close.TOLERANCES[torch.bfloat16]
        loose = replace(exact, worst=2 * exact.worst, rms=2 * exact.rms)
        monkeypatch.setitem(close.TOLERANCES, torch.bfloat16, loose)
