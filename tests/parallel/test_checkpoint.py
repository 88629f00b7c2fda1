"""Checkpoints: what is read is what was written, in any layout; damage is found; a failed write costs nothing older.

Three starts of ranks do everything: one process writes, two read that, write, read and fail, one reads what two wrote.
"""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import ONE, OTHER, PLAIN, SAME, SAVED_AT, TWO, Source, State, trainer_state, work
from helpers.ranks import run_ranks
from tiny_run import NUM_EXPERTS, Layout, build_model, micro_batches
from torch import Tensor

from moe.parallel import checkpoint
from moe.parallel.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    """A file system of 8 MB, or why there is none."""
    path = tmp_path_factory.mktemp("disk")
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as problem:
        yield f"no small file system: {getattr(problem, 'stderr', None) or problem}"
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="module")
def results(root: Path, disk: Path | str) -> dict[Any, list[Any]]:
    """What each rank returned, by source (written), pair of source and layout (read), or name."""
    found: dict[Any, list[Any]] = {}
    for world_size, sources in ((1, ONE), (2, TWO), (1, [])):
        by_rank = run_ranks(work, world_size, root, sources, disk if isinstance(disk, Path) else None)
        for key in by_rank[0]:
            found[key] = [one[key] for one in by_rank]
    return found


def pair_id(value: object) -> str:
    return value.name if isinstance(value, Source | Layout) else str(value)


def check_trainer_state(loaded: State, source: Source) -> None:
    assert loaded.trainer == {
        **trainer_state(source),
        "step": SAVED_AT,
        "optimizer_steps": SAVED_AT,
        "world_size": source.layout.world_size,
    }


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("source", "target"), SAME, ids=pair_id)
def test_same_layout_goes_on_to_the_bit(results: dict[Any, list[Any]], source: Source, target: Layout) -> None:
    for rank, (written, loaded) in enumerate(zip(results[source], results[source, target], strict=True)):
        check_trainer_state(loaded, source)
        assert_same_tensors(loaded.tensors, written.tensors)
        assert torch.equal(loaded.logits, written.logits)
        assert loaded.losses == written.losses
        assert torch.equal(loaded.random, written.random), f"random state of rank {rank}"


@pytest.mark.parametrize(("source", "target"), OTHER, ids=pair_id)
def test_other_layout_goes_on_alike(results: dict[Any, list[Any]], source: Source, target: Layout) -> None:
    written = results[source][0]
    for loaded in results[source, target]:
        check_trainer_state(loaded, source)
        assert_same_tensors(loaded.tensors, written.tensors)
        torch.testing.assert_close(loaded.logits, written.logits, rtol=1e-5, atol=1e-5)
        assert loaded.losses == pytest.approx(written.losses, rel=1e-5)


def test_the_comparison_says_something(results: dict[Any, list[Any]]) -> None:
    """Moments and biases have moved, random states differ between ranks, and the noise shows in the losses."""
    written = results[TWO[3]][0]
    for name, tensor in written.tensors.items():
        if not name.startswith(("weight/", "optimizer_steps/")):
            assert tensor.abs().max() > 0, name
    assert sum(name.startswith("buffer/") for name in written.tensors) == 2
    assert not torch.equal(results[TWO[3]][0].random, results[TWO[3]][1].random)
    noisy = next(source for source in TWO if source.run == "noisy")
    assert results[noisy][0].losses != pytest.approx(written.losses, rel=1e-5)
    assert written.losses[0] != pytest.approx(written.losses[1], rel=1e-3)


def test_checkpoint_without_moments(results: dict[Any, list[Any]]) -> None:
    for found in results["before_first_step"]:
        assert found["zero_1"] == found["truth"]
        assert found["zero_3"] == pytest.approx(found["truth"], rel=1e-5)


def test_files_hold_whole_parameters_once(results: dict[Any, list[Any]], root: Path) -> None:
    for source in TWO:
        reader = checkpoint.CheckpointReader(checkpoint.step_dir(root / source.name, SAVED_AT))
        for name, tensor in results[source][0].tensors.items():
            kind, _, key = name.partition("/")
            if kind != "optimizer_steps":
                assert reader.shape(kind, key) == list(tensor.shape), name
                assert torch.equal(reader.tensor(kind, key), tensor), name
        pieces = {key: pieces for key, pieces in reader._slices.items() if "/model" in key}
        assert all(len(p) == (source.layout.ep_size if ".mlp.experts." in key else 1) for key, p in pieces.items())
        experts = next(key for key in reader.names("weight") if ".mlp.experts." in key)
        rows = reader.tensor("weight", experts, 1, NUM_EXPERTS - 2)  # across the border between two files
        assert torch.equal(rows, results[source][0].tensors[f"weight/{experts}"][1:-2])


def test_weights_load_into_a_whole_model(results: dict[Any, list[Any]], root: Path) -> None:
    for source in (TWO[1], TWO[3]):
        model = build_model(PLAIN, seed=7)
        checkpoint.load_weights(checkpoint.step_dir(root / source.name, SAVED_AT), model)
        with torch.no_grad():
            logits = model.eval()(input_ids=micro_batches(PLAIN, 99, 0, 1)[0]["input_ids"]).logits
        torch.testing.assert_close(logits, results[source][0].logits, rtol=1e-5, atol=1e-5)
    other = build_model(replace(PLAIN, moe={"num_shared_experts": 0}))
    with pytest.raises(CheckpointError, match=r"does not fit the model.*shared_experts"):
        checkpoint.load_weights(checkpoint.step_dir(root / TWO[3].name, SAVED_AT), other)


def test_checkpoint_of_another_model_is_refused(results: dict[Any, list[Any]]) -> None:
    first = "model.layers.1.mlp."
    for messages in results["other_model"]:
        assert f"{first}experts.down_proj is [8, 16, 8] there and [8, 16, 12] here" in messages["wider"]
        assert f"{first}experts.down_proj is [8, 16, 8] there and [4, 16, 8] here" in messages["fewer"]
        assert f"{first}down_proj.weight is absent there and [16, 24] here" in messages["denser"]


def test_failed_writes_leave_older_checkpoints(results: dict[Any, list[Any]]) -> None:
    for found in results["failures"]:
        assert found["good"] == {"error": None, "names": ["step-00000001"], "newest": "step-00000001", "problems": []}
        for key, message in {
            "rank_1_full": f"rank 1: [Errno {errno.ENOSPC}] No space left on device",
            "rank_0_full": f"rank 0: [Errno {errno.EDQUOT}] {os.strerror(errno.EDQUOT)}",
            "commit": "rank 0: [Errno 5] I/O error",
        }.items():
            assert found[key] == {**found["good"], "error": message}, key
        assert found["recovered"]["names"] == ["step-00000001", "step-00000005"]
        assert found["recovered"]["newest"] == "step-00000005"


def test_newest_checkpoints_are_kept(results: dict[Any, list[Any]]) -> None:
    for found in results["failures"]:
        assert found["third"]["names"] == ["step-00000001", "step-00000005", "step-00000006"]
        assert found["keep_2"]["names"] == ["step-00000006", "step-00000007"]
        assert found["keep_2"]["error"] is None


def test_what_a_killed_run_left_is_not_taken_over(results: dict[Any, list[Any]]) -> None:
    for found in results["failures"]:
        assert found["files"] == ["manifest.json", "rank-0000.safetensors", "rank-0001.safetensors", "state.json"]
        assert found["after_a_kill"] == {
            "error": None,
            "names": ["step-00000008"],
            "newest": "step-00000008",
            "problems": [],
        }
        assert found["again"].error is None  # the same step once more replaces it


def test_full_disk(results: dict[Any, list[Any]], disk: Path | str) -> None:
    if isinstance(disk, str):
        pytest.skip(disk)
    for found in results["disk"]:
        assert found["first"] is None
        assert found["full"] is not None
        assert "space" in found["full"].lower()
        assert (found["newest"], found["problems"]) == ("step-00000001", [])
        assert found["names"] == ["filler", "step-00000001"]
        assert found["room"] is None
        assert found["names_after"] == ["step-00000003"]


# ---- damage; no ranks needed ----


@pytest.fixture
def two_checkpoints(results: dict[Any, list[Any]], root: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        shutil.copytree(checkpoint.step_dir(root / TWO[3].name, SAVED_AT), checkpoint.step_dir(tmp_path, step))
    return tmp_path


def truncate(path: Path) -> None:
    with (path / "rank-0001.safetensors").open("r+b") as file:
        file.truncate((path / "rank-0001.safetensors").stat().st_size - 1)


def flip(path: Path) -> None:
    file = path / "rank-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(manifest)))


DAMAGES = {
    "truncated": (truncate, "rank-0001.safetensors is truncated: .* bytes instead of"),
    "flipped_bit": (flip, "rank-0000.safetensors is corrupted"),
    "missing_file": (lambda path: (path / "rank-0001.safetensors").unlink(), "rank-0001.safetensors is missing"),
    "missing_state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "changed_state": (lambda path: (path / "state.json").write_text("{}"), "state.json is truncated"),
    "garbled_manifest": (
        lambda path: (path / "manifest.json").write_text('{"rank-0000.safe'),
        "manifest.json cannot be read",
    ),
    "binary_manifest": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00\x81" * 9),
        "manifest.json cannot be read",
    ),
    "manifest_of_zeros": (
        lambda path: (path / "manifest.json").write_bytes(bytes(100)),
        "manifest.json cannot be read",
    ),
    "manifest_of_another_kind": (
        lambda path: (path / "manifest.json").write_text("[1]"),
        "manifest.json cannot be read",
    ),
    "manifest_without_sums": (
        lambda path: change_manifest(path, lambda files: dict.fromkeys(files, 3)),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_one_used(two_checkpoints: Path, damage: str) -> None:
    old, new = checkpoint.list_checkpoints(two_checkpoints)
    checkpoint.verify(new)
    assert checkpoint.newest_valid(two_checkpoints) == (new, [])
    harm, message = DAMAGES[damage]
    harm(new)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify(new)
    assert str(new) in str(caught.value)
    assert checkpoint.newest_valid(two_checkpoints) == (old, [str(caught.value)])


def test_missing_manifest(two_checkpoints: Path) -> None:
    old, new = checkpoint.list_checkpoints(two_checkpoints)
    (new / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        checkpoint.verify(new)
    assert checkpoint.newest_valid(two_checkpoints)[0] == old


def test_partial_folders_are_no_checkpoints(two_checkpoints: Path) -> None:
    old, new = checkpoint.list_checkpoints(two_checkpoints)
    new.rename(two_checkpoints / ".partial-step-00000002")
    assert checkpoint.list_checkpoints(two_checkpoints) == [old]
    assert checkpoint.newest_valid(two_checkpoints) == (old, [])


def test_all_damaged_or_none(two_checkpoints: Path) -> None:
    for path in checkpoint.list_checkpoints(two_checkpoints):
        flip(path)
    newest, problems = checkpoint.newest_valid(two_checkpoints)
    assert newest is None
    assert ["step-00000002" in problems[0], "step-00000001" in problems[1]] == [True, True]
    assert checkpoint.newest_valid(two_checkpoints / "nothing_here") == (None, [])
