"""Windows of calibration text."""

from pathlib import Path

import pytest
import torch
from convert.carve.carve_case import generator

from moe.models.calibration_text import choose_text, choose_windows, read_text, split_text


def test_windows_are_whole_different_and_chosen_by_the_seed() -> None:
    ids = list(range(100))
    first = choose_windows([ids], 40, 10, generator(0))
    assert first.shape == (4, 10)
    assert first.dtype == torch.int64
    starts = first[:, 0].tolist()
    assert all(start % 10 == 0 for start in starts)
    assert len(set(starts)) == 4
    assert torch.equal(first, first[:, :1] + torch.arange(10))
    assert torch.equal(first, choose_windows([ids], 40, 10, generator(0)))
    chosen = {tuple(choose_windows([ids], 40, 10, generator(seed))[:, 0].tolist()) for seed in range(20)}
    assert len(chosen) > 10
    assert {start for starts in chosen for start in starts} == set(range(0, 100, 10)), "some windows never come up"


def test_several_texts_share_evenly() -> None:
    texts = [list(range(100)), list(range(1000, 1100)), list(range(2000, 2100))]
    found = choose_windows(texts, 80, 10, generator())
    assert torch.bincount(found[:, 0] // 1000).tolist() == [3, 3, 2]


def test_a_reserve_is_other_text_and_changes_nothing_else() -> None:
    """In equal shares, as far as there is some."""
    texts = [list(range(100)), list(range(1000, 1100))]
    plain = choose_text(texts, 80, 10, generator())
    assert plain.reserve_BL is None
    for wanted, expected in ((40, [2, 2]), (50, [3, 3]), (10**6, [6, 6])):
        found = choose_text(texts, 80, 10, generator(), wanted)
        assert torch.equal(found.calibration_BL, plain.calibration_BL)
        assert torch.bincount(found.reserve_BL[:, 0] // 1000).tolist() == expected
        starts = torch.cat((found.calibration_BL, found.reserve_BL))[:, 0].tolist()
        assert len(set(starts)) == len(starts)
    assert choose_text([list(range(40))], 40, 10, generator(), 40).reserve_BL is None


def test_short_text_and_bad_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"calibration text 1 has 35 tokens, and 40 of it are wanted; .* --tokens 30 at"
    ):
        choose_windows([list(range(35))], 40, 10, generator())
    with pytest.raises(ValueError, match=r"calibration text 2 has 5 tokens, and 10"):
        choose_windows([list(range(50)), list(range(5))], 20, 10, generator())
    with pytest.raises(ValueError, match=r"--tokens 45 must be a multiple of --window 10.*; use 40"):
        choose_windows([list(range(90))], 45, 10, generator())
    with pytest.raises(ValueError, match=r"--tokens 10 must be .* at least 20 for 2 texts; use 20"):
        choose_windows([list(range(90))] * 2, 10, 10, generator())


def test_splitting_at_a_line() -> None:
    text = "".join(f"line {index}\n" for index in range(100))
    calibration, evaluation = split_text(text)
    assert calibration + evaluation == text
    assert calibration.endswith("\n")
    assert 0.8 <= len(calibration) / len(text) < 0.82
    assert split_text("no line end") == ("no line end", "")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.txt' is not a text file"):
        read_text(tmp_path / "gone.txt")
