"""Routers made from token counts: `moe train` counts the training data for them, once, and a loaded model keeps what it has."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import Planned, losses, newest_state, run_many, weights, write_recipe
from models.tiny import VOCAB, layers_of, make_model
from torch import Tensor

from moe.parallel.ranks import Ranks
from moe.routers.hash import pack_balanced
from moe.train import model as train_model
from moe.train.config import load_config
from moe.train.data import PackedDataset, StreamingPackedDataset, TokenCache, build_data
from moe.train.model import count_tokens, give_token_counts

BALANCED = {"name": "hash", "method": "balanced", "top_k": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the same run stopped after 4 of its 6 steps and resumed; two processes each."""
    folder = tmp_path_factory.mktemp("counts")
    train = {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "eval_windows": 4, "sample_tokens": 0}
    recipe = write_recipe(folder, train=train, moe={"num_experts": 4, "router": BALANCED})
    planned = [
        Planned(name="whole", overrides=[]),
        Planned(name="parts", overrides=["train.steps=4"]),
        Planned(name="parts", overrides=[], resume=True),
    ]
    results = run_many(recipe, planned)
    assert [result.status for result in results] == [0, 0, 0], results
    return folder


def tables(run_dir: Path) -> list[Tensor]:
    found = weights(run_dir)
    return [found[f"model.layers.{layer}.mlp.router.table_VK"] for layer in range(2)]


def test_one_command_trains_with_a_table_of_the_training_data(runs: Path) -> None:
    config = load_config(runs / "recipe.yaml")
    data = build_data(config.data)
    assert isinstance(data.train, PackedDataset)
    counts_V = torch.from_numpy(np.bincount(data.train.cache.tokens_N, minlength=300))
    assert len(counts_V) == 300 and (counts_V > 0).sum() > 20
    expected_VK = pack_balanced(counts_V, 4, 2)
    for table_VK in tables(runs / "runs" / "whole"):
        assert torch.equal(table_VK, expected_VK)
    values = json.loads((runs / "runs" / "whole" / "model" / "config.json").read_text(encoding="utf-8"))
    assert values["moe"]["router"] == {**BALANCED, "vocab_size": 300}
    found = losses(runs / "runs" / "whole")
    assert len(found) == 6 and all(map(math.isfinite, found.values()))
    assert found[6] < found[1]


def test_a_resumed_run_has_its_table_from_the_checkpoint(runs: Path) -> None:
    for table_VK, expected_VK in zip(tables(runs / "runs" / "parts"), tables(runs / "runs" / "whole"), strict=True):
        assert torch.equal(table_VK, expected_VK)
    assert newest_state(runs / "runs" / "parts")["step"] == 6
    assert losses(runs / "runs" / "parts")[6] < losses(runs / "runs" / "parts")[1]


def packed(tokens: list[int]) -> PackedDataset:
    cache = TokenCache("train", np.array(tokens, dtype=np.uint16), np.array([0, len(tokens)]), ["a"], "fingerprint")
    return PackedDataset(cache, 2, seed=0)


class OneRank(Ranks):
    def sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


ONE = OneRank(rank=0, world_size=1, device=torch.device("cpu"))


def test_only_tables_that_are_missing_are_made() -> None:
    model = make_model(router={**BALANCED, "vocab_size": VOCAB})
    first, second = (layer.router for layer in layers_of(model))
    second.set_token_counts(torch.arange(VOCAB))
    loaded_VK = second.table_VK.clone()
    tokens = [7] * 5 + [3] * 4 + [9] * 4
    give_token_counts(model, VOCAB, packed(tokens), ONE)
    assert torch.equal(first.table_VK, pack_balanced(torch.bincount(torch.tensor(tokens), minlength=VOCAB), 4, 2))
    assert torch.equal(second.table_VK, loaded_VK)
    assert not torch.equal(first.table_VK, loaded_VK)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    give_token_counts(model, VOCAB, packed([1, 2, 3]), ONE)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_stream_cannot_be_counted() -> None:
    stream = object.__new__(StreamingPackedDataset)
    model = make_model(router={**BALANCED, "vocab_size": VOCAB})
    with pytest.raises(ValueError, match=r"data.streaming=true does not .*set data.streaming=false, or moe.router.met"):
        give_token_counts(model, VOCAB, stream, ONE)
    give_token_counts(make_model(), VOCAB, stream, ONE)  # other routers do not ask


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_counting(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "_COUNTED_AT_ONCE", 4)
    tokens_N = np.random.default_rng(0).integers(0, 20, 37).astype(np.uint16)
    parts = [
        count_tokens(tokens_N, 25, Ranks(rank=rank, world_size=world_size, device=torch.device("cpu")))
        for rank in range(world_size)
    ]
    assert sum(parts).tolist() == np.bincount(tokens_N, minlength=25).tolist()
    assert all(part.sum() > 0 for part in parts)
