"""Noise upcycling: what is added, and where."""

from pathlib import Path

import pytest
import torch
from convert.upcycle.ffns import DIM, WIDTH, kept_rows, make_ffn, matrices
from convert.upcycle.sources import convert, save_dense

from moe.convert.upcycle import UPCYCLERS, UpcycleOptions


def changes(indices: str, **options: float) -> list[list[torch.Tensor]]:
    """Per expert, what was added to each matrix, neurons in rows."""
    ffn, chosen = make_ffn(), UpcycleOptions(num_experts=4, method="noise", indices=indices, **options)
    experts = UPCYCLERS["noise"].experts([ffn], chosen, torch.Generator().manual_seed(0))
    return [[after - before for before, after in zip(matrices(ffn), matrices(e), strict=True)] for e in experts]


@pytest.mark.parametrize(("ratio", "std"), [(0.5, 0.02), (0.25, 0.1)])
def test_noise_on_one_set_of_neurons(ratio: float, std: float) -> None:
    for added in changes("shared", ratio=ratio, noise_std=std):
        where = [(delta != 0).all(1) for delta in added]
        assert all(torch.equal(where[0], other) for other in where)
        assert where[0].sum() == ratio * WIDTH
        for delta in added:
            assert not delta[~where[0]].any()
            noise = delta[where[0]]
            assert noise.std() == pytest.approx(std, rel=0.05)
            assert abs(noise.mean()) < 5 * std / noise.numel() ** 0.5


def test_independent_draws_leave_fewer_neurons_whole() -> None:
    ffn = make_ffn()
    options = UpcycleOptions(num_experts=4, method="noise", indices="independent")
    for expert in UPCYCLERS["noise"].experts([ffn], options, torch.Generator().manual_seed(0)):
        maps = [kept_rows(before, after) for before, after in zip(matrices(ffn), matrices(expert), strict=True)]
        assert [len(rows) for rows in maps] == [WIDTH // 2] * 3
        both = set(maps[0]) & set(maps[1]) & set(maps[2])
        assert len(both) / WIDTH == pytest.approx(0.125, abs=0.06)
    assert ffn.down_DF.shape == (DIM, WIDTH)


def test_no_noise_is_exact_and_some_is_not(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    assert convert(source, tmp_path / "none", method="noise", noise_std=0.0).is_exact
    done = convert(source, tmp_path / "some", method="noise")
    assert not done.is_exact
    assert done.comparison is not None
    assert 1e-3 < done.comparison.max_diff < 10
