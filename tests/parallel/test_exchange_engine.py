"""Training through the engine with options of the exchange: the same losses and gradients as a plain loop on one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from tiny_run import NUM_EXPERTS, B, Run, Trace, build_model, optimizer_options, param_groups, train_plain, train_step

from moe.parallel import trace as tracing
from moe.parallel.engine import Engine
from moe.parallel.exchange.config import ExchangeConfig

TOLERANCE = 1e-5
RUN = replace(Run(), steps=3)
CASES: dict[str, dict[str, Any]] = {
    "chunks": {"overlap_chunks": 2},
    "chunks_zero_3": {"overlap_chunks": 3},
    "chunks_checkpointing": {"overlap_chunks": 2},
    "plain": {"dedup": False},
}


def train(name: str) -> dict[str, Any]:
    run, trace = replace(RUN, checkpointing="checkpointing" in name), Trace()
    model = build_model(run)
    config = {
        "train_micro_batch_size_per_gpu": B // dist.get_world_size(),
        "gradient_accumulation_steps": run.grad_accum,
        "gradient_clipping": run.clip,
        "zero_optimization": {"stage": 3 if "zero_3" in name else 1},
        "steps_per_print": 2**31,
    }
    exchange = ExchangeConfig(**CASES[name])
    engine = Engine(model, param_groups(model), torch.optim.AdamW, optimizer_options(run), config, 2, exchange)
    layers: set[str] = set()
    with tracing.observe(lambda collective: layers.add(collective.layer)):
        for step in range(run.steps):
            train_step(run, engine, step, trace)
    engine.module.destroy()
    return {"trace": trace, "layers": sorted(layers)}


def all_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    return {name: train(name) for name in CASES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(all_on_one_rank, 2)


@pytest.fixture(scope="module")
def expected() -> Trace:
    return train_plain(RUN)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_same_run(ranks: list[dict[str, Any]], expected: Trace, name: str) -> None:
    for rank, found in enumerate(ranks):
        got = found[name]["trace"]
        assert got.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert got.norms == pytest.approx(expected.norms, rel=TOLERANCE)
        mine = slice(rank * NUM_EXPERTS // 2, (rank + 1) * NUM_EXPERTS // 2)
        for step, gradients in enumerate(expected.gradients):
            for key, value in gradients.items():
                want = value[mine] if ".experts." in key else value
                error = (got.gradients[step][key] - want).abs().max().item()
                assert error <= TOLERANCE * value.abs().max().item(), f"rank {rank}, step {step}, {key}: {error:.1e}"
    assert expected.losses[0] != expected.losses[1]


def test_collectives_know_their_layer(ranks: list[dict[str, Any]]) -> None:
    """The second and third of three layers have experts."""
    for found in ranks:
        first, second = found["chunks"]["layers"]
        assert "layers.1." in first
        assert "layers.2." in second
