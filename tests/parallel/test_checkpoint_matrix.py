"""A run that moves to other numbers of ranks, EP degrees and ZeRO stages goes on as the one that stayed, moments included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_matrix import PAIRS, SOURCES, work
from checkpoint_runs import Source
from helpers.ranks import run_ranks
from tiny_run import Layout

from moe.parallel import checkpoint

pytestmark = pytest.mark.slow  # four processes import DeepSpeed
# Losses after the move: other orders of summation, then other roundings of weights to bf16.
TOLERANCE = {"plain": 2e-5, "bf16": 1e-2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for world_size in (1, 2, 4, 2, 1):  # up, and down again
        by_rank = run_ranks(work, world_size, root, timeout=500)
        for key in by_rank[0]:
            found[key] = [one[key] for one in by_rank]
    return found


def pair_id(value: object) -> str:
    return value.name if isinstance(value, Source | Layout) else str(value)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=pair_id)
def test_goes_on_elsewhere(results: dict[Any, list[Any]], source: Source, target: Layout) -> None:
    written = results[source][0]
    assert len(results[source, target]) == target.world_size
    for loaded in results[source, target]:
        assert loaded.tensors.keys() == written.tensors.keys()
        for name, tensor in written.tensors.items():
            assert torch.equal(loaded.tensors[name], tensor), name
        assert loaded.losses == pytest.approx(written.losses, rel=TOLERANCE[source.run])


def test_the_matrix_covers_what_it_says() -> None:
    moves = {(source.layout.world_size, target.world_size) for source, target in PAIRS}
    assert moves >= {(2, 1), (1, 4), (4, 2), (4, 1), (2, 4)}
    degrees = {(source.layout.ep_size, target.ep_size) for source, target in PAIRS}
    assert degrees >= {(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)}
    stages = {frozenset((source.layout.zero_stage, target.zero_stage)) for source, target in PAIRS}
    assert stages >= {frozenset(pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))}
    assert {(s.layout.world_size, t.world_size) for s, t in PAIRS if s.run == "bf16"} == {
        (1, 4),
        (2, 4),
        (4, 2),
        (2, 1),
    }


def test_every_layout_writes_true_checksums(results: dict[Any, list[Any]], root: Path) -> None:
    for sources in SOURCES.values():
        for source in sources:
            (path,) = (root / source.name).iterdir()
            assert checkpoint.verify_tensors(path) > 60
