"""Optimizer states on a disk: the same training, and files that are really there while it runs. Needs libaio and its headers."""

import warnings
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from tiny_run import Run, Trace, build_model, make_engine, train_step

RUN = Run(steps=3)
# Smaller states stay in memory, whatever was asked for.
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def train(rank: int, world_size: int, folder: str) -> tuple[list[float], list[float], int]:
    """Losses without and with offload, and bytes on the disk after the last step."""
    places = {"device": "nvme", "nvme_path": folder}
    losses = []
    for offload in ({}, {"offload_optimizer": places, "offload_param": places}):
        engine, trace = (
            make_engine(RUN, 2, 3, build_model(RUN, **WIDE), zero_optimization={"stage": 3, **offload}),
            Trace(),
        )
        for step in range(RUN.steps):
            train_step(RUN, engine, step, trace)
        losses.append(trace.losses)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*.swp"))
        engine.module.destroy()
    return losses[0], losses[1], written


@pytest.mark.slow
def test_states_on_a_disk(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers (libaio-dev)")
    for plain, offloaded, written in run_ranks(train, 2, str(tmp_path), timeout=900):  # it may have to compile first
        assert written > 2**20
        assert offloaded == pytest.approx(plain, rel=1e-6)
