"""The parts of a checkpoint that need no ranks: the tensor file, checksums, and what rank 0 concludes from records."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe.parallel.checkpoint.checksums import checksum, checksums
from moe.parallel.checkpoint.files import FileRecord
from moe.parallel.checkpoint.records import RankRecord, drifted, missing_slices, read_record, write_record
from moe.parallel.checkpoint.tensor_file import TensorFile, TensorSpec, write_tensors

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(5).bfloat16(),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(3).double(),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "int": torch.arange(3, dtype=torch.int32),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).T,
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, TENSORS, {"format": "pt", "note": "ü"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    content = path.read_bytes()
    assert record == FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_large_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.parallel.checkpoint.tensor_file._CHUNK", 10)
    record = write_tensors(tmp_path / "a", TENSORS, {})
    monkeypatch.undo()
    assert write_tensors(tmp_path / "b", TENSORS, {}) == record
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_must_get_what_it_announced(tmp_path: Path) -> None:
    specs = {name: TensorSpec(dtype=torch.float32, shape=(2,)) for name in ("a", "b")}
    with TensorFile(tmp_path / "x", specs, {}) as file:
        with pytest.raises(AssertionError, match="out of order"):
            file.write("b", torch.zeros(2))
        with pytest.raises(AssertionError, match="not what was announced"):
            file.write("a", torch.zeros(3))
        file.write("a", torch.zeros(2))
        with pytest.raises(AssertionError, match="b was not written"):
            file.finish()


def test_checksums_depend_on_values_and_places_alone() -> None:
    bank = torch.randn(6, 300, 1001)  # more than one chunk per expert
    whole = checksums(bank, is_expert=True)
    assert len(set(whole)) == 6
    assert checksums(bank[2:4].clone(), is_expert=True) == whole[2:4]
    assert checksums(bank.transpose(1, 2).contiguous().transpose(1, 2), is_expert=True) == whole
    swapped = bank[0].clone()
    swapped[0, 0], swapped[299, 1000] = bank[0, 299, 1000], bank[0, 0, 0]
    assert checksum(swapped) != whole[0]
    flipped = bank[0].clone()
    flipped.view(torch.int32)[150, 500] ^= 1
    assert checksum(flipped) != whole[0]


def test_checksums_of_zeros_of_any_sign_and_of_what_is_no_number() -> None:
    values = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    negative = torch.tensor([-0.0, 1.0, float("nan"), float("inf")])
    assert checksum(values) == checksum(negative) != checksum(torch.zeros(4))
    assert checksum(torch.tensor(5)) != checksum(torch.tensor(6))
    assert checksum(torch.tensor([True, False])) != checksum(torch.tensor([False, True]))


def record(checksums: dict[str, list[str]], replicas: dict[str, list[str]] | None = None) -> RankRecord:
    return RankRecord(token="t", file=FileRecord(size=1, sha256="0"), checksums=checksums, replicas=replicas or {})


WHOLE = {"weight/experts": 4, "weight/dense": 1, "buffer/bias": 1}
FIRST, SECOND = (
    {"weight/experts@0": ["a", "b"], "weight/dense": ["d"]},
    {"weight/experts@2": ["c", "e"], "buffer/bias": ["f"]},
)


def test_slices_of_all_ranks_make_the_whole_model() -> None:
    assert missing_slices([record(FIRST), record(SECOND)], WHOLE) is None
    assert missing_slices([record(SECOND), record(FIRST)], WHOLE) is None


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"weight/experts@0": ["c", "e"], "buffer/bias": ["f"]}, "rank 1 wrote weight/experts from 0 on where 2"),
        ({"weight/experts@3": ["e"], "buffer/bias": ["f"]}, "rank 1 wrote weight/experts from 3 on where 2"),
        (
            {"weight/experts@2": ["c"], "buffer/bias": ["f"]},
            "weight/experts has 3 parts in the files of all ranks, not 4",
        ),
        ({"weight/experts@2": ["c", "e"]}, "buffer/bias has 0 parts"),
        ({**SECOND, "weight/dense": ["d"]}, "rank 1 wrote weight/dense from 0 on where 1"),
        ({**SECOND, "weight/other": ["d"]}, "weight/other has 1 parts in the files of all ranks, not 0"),
    ],
)
def test_missing_and_double_slices_are_named(second: dict[str, list[str]], message: str) -> None:
    found = missing_slices([record(FIRST), record(second)], WHOLE)
    assert found is not None and message in found


def test_drift_names_parameter_expert_and_ranks() -> None:
    others = {"weight/experts@0": ["a", "x"], "weight/dense": ["d"], "buffer/bias": ["y"]}
    assert drifted([record(FIRST), record(SECOND, {"weight/dense": ["d"]})]) == []
    assert drifted([record(FIRST), record(SECOND), record({}, others)]) == [
        "expert 1 of weight/experts differs between ranks [0, 2]",
        "buffer/bias differs between ranks [1, 2]",
    ]
    many = {f"weight/{i}": ["a"] for i in range(9)}
    lines = drifted([record(many), record({}, {key: ["b"] for key in many})])
    assert len(lines) == 5 and lines[-1] == "and 5 more"


def test_records_of_other_attempts_are_not_taken(tmp_path: Path) -> None:
    assert read_record(tmp_path, 3, "t") is None
    written = record(FIRST, SECOND)
    write_record(tmp_path, 3, written)
    assert read_record(tmp_path, 3, "t") == written
    assert read_record(tmp_path, 3, "u") is None
    assert read_record(tmp_path, 2, "t") is None
