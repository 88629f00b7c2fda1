"""`StreamedTensorFile` against the safetensors library."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from moe.parallel.checkpoint import tensor_file
from moe.parallel.checkpoint.tensor_file import StreamedTensorFile

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=8))
def test_the_library_reads_what_was_streamed(parts: list[tuple[torch.dtype, tuple[int, ...]]], tmp_path: Path) -> None:
    tensors = {f"tensor.{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(parts)}
    file = StreamedTensorFile(tmp_path / "x.safetensors", {"format": "pt"})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    assert file.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    file.finish()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_views_are_written_by_value_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_CHUNK", 7)
    base = torch.randn(6, 8)
    file = StreamedTensorFile(tmp_path / "x", {})
    views = {"transposed": base.t(), "strided": base[::2, 1:5], "expanded": base[:1].expand(3, 8), "scalar": base[0, 0]}
    for name, tensor in views.items():
        file.write(name, tensor)
    file.finish()
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


def test_an_unfinished_file_is_unreadable(tmp_path: Path) -> None:
    file = StreamedTensorFile(tmp_path / "x", {})
    file.write("a", torch.ones(1000))
    file.close()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x")


def test_the_header_fits_as_many_names_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedTensorFile, "HEADER_ROOM", 4096)
    file = StreamedTensorFile(tmp_path / "x", {"format": "pt"})
    number = 0
    # The longest entries: many dimensions, and offsets of many digits stand for the room kept per entry.
    while file.has_room_for(name := f"model.layers.{number}.weight"):
        file.write(name, torch.ones(1, 1, 1, 1))
        number += 1
    file.finish()
    assert number > 10 and len(load_file(tmp_path / "x")) == number
