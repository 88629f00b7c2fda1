"""Checkpoints beside training, and the guards against silent mistakes: one start of two ranks does everything."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_guards import DENSE, EXPERTS, LOCAL, TAMPERS, work
from helpers.ranks import run_ranks

from moe.parallel import checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[str, Any]]:
    return run_ranks(work, 2, root)


def test_training_goes_on_while_a_checkpoint_is_written(results: list[dict[str, Any]]) -> None:
    """`checkpoint_guards` compares what is stored with the state at the time of each `begin`."""
    for found in (result["beside"] for result in results):
        assert found["meanwhile"] == (True, True, [])
        assert found["second"].startswith("collect the save under way first")
        assert found["idle"] == (False, False)
        assert found["errors"] == (None, None, [], [])
        assert found["reused"], "one snapshot's memory is enough"


def test_a_failure_beside_training_reaches_all_ranks(results: list[dict[str, Any]]) -> None:
    for found in (result["failures"] for result in results):
        assert found["good"][0] is None
        assert found["failed"][0] == found["silent"][0] == "rank 1: the disk is gone"
        assert found["rank_0"][0] == "rank 0: the disk is gone"
        assert found["silent"][1] < 30, "nobody waits for a record that will not come"
        assert found["names"] == ["step-00000001"], "the older one is untouched, and nothing else is left"


def test_a_checkpoint_becomes_complete_when_training_has_failed(results: list[dict[str, Any]]) -> None:
    for found in (result["lonely"] for result in results):
        assert found["complete"] == ["step-00000001"]
        assert found["names"] == ["step-00000001"], "without a rank's file it is given up"
        assert found["seconds"] < 20
    assert results[0]["lonely"]["seconds"] > 0.3


def test_ranks_that_do_not_share_a_disk_are_told(results: list[dict[str, Any]], root: Path) -> None:
    for found in results:
        assert "the files of ranks [1]" in found["other_disk"]
        assert "must be on a file system that all ranks share" in found["other_disk"]
    assert not checkpoint.list_checkpoints(root / "disk-0")


def test_weights_that_the_rank_does_not_compute_with_are_not_saved(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert "the optimizer's weight of model.layers.1.mlp.experts" in found["foreign"]
        assert "is not the one that the model has" in found["foreign"]


MESSAGES = {
    "swapped_experts": [f"weight of expert {LOCAL + 1} of {EXPERTS} on rank 1", "according to rank-000"],
    "swapped_moments": [f"exp_avg of expert 0 of {EXPERTS} on rank 0", "according to rank-000"],
    "first_experts_twice": [f"exp_avg_sq of expert {LOCAL} of {EXPERTS} on rank 1"],
    "moments_of_another_parameter": [f"exp_avg of {DENSE} on rank 0"],
    "another_bias": ["bias_E: not what rank-0000.safetensors"],
    "first_experts_relabelled": [f"has weight/{EXPERTS} from row 0 on, where row {LOCAL} should follow"],
    "no_checksums": ["has no checksum of weight/"],
}


@pytest.mark.parametrize("name", TAMPERS)
def test_wrong_contents_under_a_right_manifest_are_refused(
    results: list[dict[str, Any]], root: Path, name: str
) -> None:
    first = results[0]["tampered"][name]
    for found in results:
        assert found["tampered"]["good"] is None
        assert found["tampered"][name] is not None and all(part in found["tampered"][name] for part in MESSAGES[name])
        assert found["tampered"][name] == first, "all ranks say the same"
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.verify_tensors(root / "tampered" / name)


def test_verify_tensors_accepts_the_good_one(results: list[dict[str, Any]], root: Path) -> None:
    path = root / "tampered" / "step-00000001"
    reader = checkpoint.CheckpointReader(path)
    kinds = ("weight", "exp_avg", "exp_avg_sq", "buffer")
    assert checkpoint.verify_tensors(path) == sum(len(reader.names(kind)) for kind in kinds) > 60


def test_a_loader_that_puts_things_in_wrong_places_is_caught(results: list[dict[str, Any]]) -> None:
    for found in (result["misplaced"] for result in results):
        assert "weight of expert 0 of model.layers.1.mlp.experts." in found["other_ranks_experts"]
        assert "exp_avg_sq of model.embed_tokens.weight on rank 0" in found["no_second_moment"]
        assert "rank 0 does not compute with the loaded weight of model.embed_tokens" in found["stale_model"]
        assert found["good"] is None


def test_ranks_that_drift_apart_are_named(results: list[dict[str, Any]]) -> None:
    for found in (result["drift"] for result in results):
        assert found["same"] == []
        assert found["expert"] == [f"expert 3 of weight/{EXPERTS} differs between ranks [0, 1]"]
        assert sorted(found["moment_and_bias"]) == [
            "buffer/model.layers.2.mlp.router.bias_E differs between ranks [0, 1]",
            f"exp_avg_sq/{DENSE} differs between ranks [0, 1]",
        ]
