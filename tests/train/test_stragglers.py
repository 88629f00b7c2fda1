"""Which rank is called a straggler, when, and that a real slow rank is found in a real run."""

import json
from pathlib import Path

import pytest
from helpers.runs import Planned, run_many, write_recipe

from moe.train.metrics import read_metrics
from moe.train.stragglers import FACTOR, WINDOW_STEPS, StragglerWatch


def watch(*, ranks: int = 4, window_steps: int = 3) -> StragglerWatch:
    return StragglerWatch([f"node{rank // 2}" for rank in range(ranks)], window_steps)


def feed(watcher: StragglerWatch, seconds: list[float], steps: int = 3) -> list[str]:
    return [message for _ in range(steps) for message in watcher.add(seconds)]


def test_a_slow_rank_is_named_with_host_and_factor_once() -> None:
    watcher = watch()
    (message,) = feed(watcher, [1.0, 1.1, 1.0, 2.0])
    assert message.startswith("straggler: rank 3 (host node1) took 2.0 times the median rank's time over 3 steps")
    assert feed(watcher, [1.0, 1.1, 1.0, 2.5]) == [], "it is known"
    assert feed(watcher, [1.0] * 4) == ["straggler: rank 3 (host node1) is as fast as the others again"]
    assert len(feed(watcher, [1.0, 1.1, 1.0, 2.0])) == 1, "and may be slow again"


def test_nothing_is_said_of_one_slow_step_or_below_the_factor() -> None:
    watcher = watch()
    assert feed(watcher, [1.0, 1.0, 1.0, 1.9], 1) + feed(watcher, [1.0] * 4, 2) == []
    assert feed(watcher, [1.0, 1.0, 1.0, FACTOR - 0.01]) == []
    assert feed(watcher, [1.0, 1.0, 1.0, 10.0], 1) == [], "the window of before is closed"


def test_of_two_ranks_the_slow_one() -> None:
    (message,) = feed(watch(ranks=2), [1.0, 1.6])
    assert "rank 1" in message and "1.6 times" in message


def test_nobody_waits_for_a_single_rank() -> None:
    assert feed(watch(ranks=1), [5.0]) == []


@pytest.mark.slow
def test_a_slow_rank_in_a_run(tmp_path: Path) -> None:
    """Rank 1 takes longer to fetch its batches; rank 0 waits as long, and is not accused."""
    recipe = write_recipe(tmp_path, train={"steps": 2 * WINDOW_STEPS, "checkpoint_every": 0})
    (result,) = run_many(recipe, [Planned(name="run", overrides=[], slow_rank=1, slow_seconds=0.15)])
    assert result.status == 0, result.error
    messages = [event["message"] for event in read_metrics(tmp_path / "runs" / "run").events]
    found = [message for message in messages if message.startswith("straggler")]
    assert len(found) == 1 and "straggler: rank 1 (host " in found[0], json.dumps(messages)
    assert found[0] in result.stderr
