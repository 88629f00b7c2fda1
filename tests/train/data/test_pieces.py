from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.train.data.pieces import file_blocks, text_pieces


@given(st.text(alphabet="ab \né", max_size=200), st.integers(1, 20))
def test_pieces_join_to_the_text_and_respect_the_limit(text, limit):
    pieces = list(text_pieces(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_pieces_end_at_lines_else_before_spaces():
    assert list(text_pieces("aaaa\nbbbb\ncccc", 7)) == ["aaaa\n", "bbbb\n", "cccc"]
    assert list(text_pieces("aaaa bbbb cccc", 7)) == ["aaaa", " bbbb", " cccc"]
    assert list(text_pieces("aaaabbbb", 3)) == ["aaa", "abb", "bb"]


@settings(deadline=None)
@given(st.text(alphabet="ab \né日😀", max_size=200), st.integers(8, 40), st.booleans())
def test_blocks_join_to_the_file(tmp_path_factory, text, limit, with_mark):
    path: Path = tmp_path_factory.mktemp("blocks") / "x.txt"
    path.write_bytes((b"\xef\xbb\xbf" if with_mark else b"") + text.encode())
    blocks = list(file_blocks(path, limit))
    assert "".join(blocks) == text
    assert all(0 < len(block.encode()) <= limit for block in blocks)


def test_blocks_end_at_lines(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"".join(b"line %d\r\n" % number for number in range(1000)))
    blocks = list(file_blocks(path, 256))
    assert len(blocks) > 10 and all(block.endswith("\r\n") for block in blocks)


@pytest.mark.parametrize("bad", [b"\xff", b"\x80" * 50, b"\xe6\x97"])
def test_invalid_utf8_becomes_the_replacement_character(tmp_path, bad):
    path = tmp_path / "x.txt"
    path.write_bytes(b"good " * 10 + bad + b" good" * 10)
    text = "".join(file_blocks(path, 16))
    assert "\ufffd" in text
    assert text.replace("\ufffd", "").split() == ["good"] * 20
