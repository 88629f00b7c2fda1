"""`moe.models.evaluate` against a count by hand."""

import math

import pytest
import torch
from models.tiny import layers_of, make_model, tokens

from moe.models.evaluate import cut_windows, perplexity


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_perplexity(kind: str, batch_size: int) -> None:
    model, windows = make_model(kind).eval(), tokens(7, 6)
    total, count = 0.0, 0
    for window in windows:
        logits = model(window[None]).logits[0].double()
        for position in range(5):
            logits_V = logits[position]
            total += (logits_V.exp().sum().log() - logits_V[window[position + 1]]).item()
            count += 1
    calls: list[tuple[int, int]] = []
    found = perplexity(model, windows, lambda done, of: calls.append((done, of)), batch_size)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (found["tokens"], found["windows"]) == (35, 7)
    assert calls == [(min(start + batch_size, 7), 7) for start in range(0, 7, batch_size)]
    assert all(layer.stats.num_micro_batches == 0 for layer in layers_of(model))


def test_a_uniform_model_has_the_vocabularys_size() -> None:
    model = make_model().eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens(2, 5))["perplexity"] == pytest.approx(48, rel=1e-5)


def test_a_hopeless_model_does_not_overflow() -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = perplexity(model, tokens(2, 5))
    assert found["loss"] > 1000
    assert math.isfinite(found["perplexity"])


def test_windows() -> None:
    ids = list(range(11))
    assert cut_windows(ids, 3, None).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(ids, 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut_windows(ids, 3, 100).shape == (3, 3)
    assert cut_windows(ids, 11, None).dtype == torch.int64
    with pytest.raises(ValueError, match=r"the text has 11 tokens, less than one window of 12; lower --window"):
        cut_windows(ids, 12, None)
    with pytest.raises(ValueError, match="0 tokens"):
        cut_windows([], 2, None)
