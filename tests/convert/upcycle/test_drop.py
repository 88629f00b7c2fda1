"""Drop-Upcycling: which neurons are redrawn, from what distribution, and what stays whole."""

from pathlib import Path

import pytest
import torch
from convert.upcycle.ffns import DIM, WIDTH, kept_rows, make_ffn, matrices
from convert.upcycle.sources import convert, greedy, load, logits, save_dense, tokens
from torch.nn import functional as F

from moe.convert.dense import DenseFFN, read_ffn
from moe.convert.upcycle import UPCYCLERS, UpcycleOptions
from moe.convert.upcycle.weights import layer_weights
from moe.models.folder import ModelFolder

EXPERTS = 6


def experts_of(ffn: DenseFFN, seed: int = 0, **options: object) -> list[DenseFFN]:
    chosen = UpcycleOptions(num_experts=EXPERTS, method="drop", **options)
    return list(UPCYCLERS["drop"].experts([ffn], chosen, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("ratio", "num"), [(0.5, 200), (0.29, 116), (0.333, 133), (1.0, 400), (0.001, 0)])
def test_shared_indices_are_one_set_per_expert(ratio: float, num: int) -> None:
    ffn, sets = make_ffn(), []
    for expert in experts_of(ffn, ratio=ratio):
        changed = [(after != before).any(1) for before, after in zip(matrices(ffn), matrices(expert), strict=True)]
        assert all(torch.equal(changed[0], other) for other in changed)
        assert changed[0].sum() == num
        for before, after in zip(matrices(ffn), matrices(expert), strict=True):
            assert (after != before).all(1).sum() == num  # the whole neuron is new
        sets.append(changed[0])
    if 0 < num < WIDTH:
        assert not any(torch.equal(sets[0], other) for other in sets[1:])


def test_how_many_neurons_stay_whole() -> None:
    """Half of them by the paper's definition; an eighth by the released code's independent draws, which also shuffle."""
    ffn = make_ffn()
    for expert in experts_of(ffn):
        maps = [kept_rows(before, after) for before, after in zip(matrices(ffn), matrices(expert), strict=True)]
        assert maps[0] == maps[1] == maps[2]
        assert len(maps[0]) == WIDTH // 2
        assert all(row == old for row, old in maps[0].items())
    whole = []
    for expert in experts_of(ffn, indices="independent"):
        maps = [kept_rows(before, after) for before, after in zip(matrices(ffn), matrices(expert), strict=True)]
        assert [len(rows) for rows in maps] == [WIDTH // 2] * 3
        both = maps[0].keys() & maps[1].keys() & maps[2].keys()
        assert all(maps[0][row] == maps[1][row] == maps[2][row] for row in both)  # one shuffle for the three
        assert sum(row == old for row, old in maps[0].items()) < 10
        whole.append(len(both) / WIDTH)
    assert sum(whole) / EXPERTS == pytest.approx(0.125, abs=0.02)


@pytest.mark.parametrize("indices", ["shared", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_entries_have_the_moments_of_what_they_replace(indices: str, dtype: torch.dtype) -> None:
    """Per matrix: with 200 * 24 entries the mean is known to 1/70 of the deviation, the deviation to 1 %."""
    ffn = make_ffn(dtype)
    for expert in experts_of(ffn, indices=indices)[:2]:
        for before, after in zip(matrices(ffn), matrices(expert), strict=True):
            assert after.dtype == dtype
            kept = kept_rows(before, after)
            new = after[[row for row in range(WIDTH) if row not in kept]].float()
            old = before[[row for row in range(WIDTH) if row not in kept.values()]].float()
            assert new.shape == old.shape == (WIDTH // 2, DIM)
            assert abs(new.mean() - old.mean()) < 5 * old.std() / new.numel() ** 0.5
            assert new.std() == pytest.approx(old.std().item(), rel=0.05)
            assert ((new - new.mean()).abs() > 2 * new.std()).float().mean() == pytest.approx(0.0455, abs=0.015)


def test_moments_are_those_of_the_replaced_entries_not_of_the_matrix() -> None:
    """Neurons of the first half are large; a redrawn set has the deviation of its own mixture."""
    ffn = make_ffn()
    assert ffn.gate_FD is not None
    ffn.gate_FD[: WIDTH // 2] *= 10
    spreads = set()
    for expert in experts_of(ffn, ratio=0.05):
        assert expert.gate_FD is not None
        changed = (expert.gate_FD != ffn.gate_FD).any(1)
        old, new = ffn.gate_FD[changed].std(), expert.gate_FD[changed].std()
        assert new == pytest.approx(old.item(), rel=0.15)
        spreads.add(round(old.item(), 3))
    assert len(spreads) > 1


def test_function_against_a_loop_over_neurons(tmp_path: Path) -> None:
    """An MoE layer of dropped experts is the weighted sum over their neurons, computed one by one."""
    source = save_dense(tmp_path / "dense", num_hidden_layers=1)
    convert(source, tmp_path / "moe", method="drop")
    layer = load(tmp_path / "moe").model.layers[0].mlp
    x_TD = torch.randn(5, 32)
    with torch.no_grad():
        got = layer(x_TD)
        scores = (x_TD @ layer.router.weight.T).softmax(-1)
        for token in range(5):
            best = sorted(range(4), key=lambda e: -scores[token, e].item())[:2]
            expected, total = torch.zeros(32), sum(scores[token, e].item() for e in best)
            for expert in best:
                gate_up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
                for neuron in range(48):
                    value = F.silu(gate_up[neuron] @ x_TD[token]) * (gate_up[48 + neuron] @ x_TD[token])
                    expected += scores[token, expert] / total * value * down[:, neuron]
            torch.testing.assert_close(got[token], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("indices", ["shared", "independent"])
def test_ratio_0_keeps_the_function(indices: str, tmp_path: Path) -> None:
    source, ids = save_dense(tmp_path / "dense", "qwen3"), tokens(2, 40)
    done = convert(source, tmp_path / "moe", method="drop", ratio=0.0, indices=indices)
    assert done.is_exact
    dense, experts = load(source), load(tmp_path / "moe")
    assert (logits(experts, ids) - logits(dense, ids)).abs().max() < 1e-5
    assert greedy(experts, ids[:1, :6]) == greedy(dense, ids[:1, :6])


def test_ratio_half_changes_the_function_and_says_so(tmp_path: Path) -> None:
    done = convert(save_dense(tmp_path / "dense"), tmp_path / "moe", method="drop")
    assert not done.is_exact
    assert done.comparison is not None
    assert done.comparison.max_diff > 0.1
    assert "changes the function" in (tmp_path / "moe" / "README.md").read_text()


def test_seeds(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one other experts, and a layer does not depend on which others are converted."""
    source = save_dense(tmp_path / "dense")
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        convert(source, tmp_path / name, method="drop", **options)
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    folder, options = ModelFolder(source), UpcycleOptions(num_experts=4, method="drop")
    convert(source, tmp_path / "top", method="drop", layers="2")
    alone, all_layers = load(tmp_path / "top"), load(tmp_path / "a")
    for other in (alone, all_layers):
        found = other.model.layers[2].mlp.experts.down_proj
        assert torch.equal(found, layer_weights([folder], 2, options).down_EDF)
    assert not torch.equal(read_ffn(folder, 2).down_DF, found[0])
