import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from moe.train.data import BatchLoader, DataConfig, StreamingPackedDataset, build_data
from moe.train.data.cache_folder import cache_root
from moe.train.data.stdlib_source import StdlibSource
from tests.train.data.small_data import make_text


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(make_text(number) for number in range(200)), encoding="utf-8")
    return path


def config_of(corpus, **values):
    defaults = {"source": str(corpus), "seq_len": 32, "cache_dir": str(corpus.parent / "cache")}
    return DataConfig(**defaults | values, tokenizer={"vocab_size": 300})


def test_end_to_end(corpus):
    data = build_data(config_of(corpus))
    (batch,) = BatchLoader(data.train, 4, 0, 1).next_step()
    assert batch.input_ids_BL.max() < len(data.tokenizer) == 300
    text = corpus.read_text(encoding="utf-8")
    for row in batch.input_ids_BL:
        for part in data.tokenizer.decode(row).split("<|endoftext|>"):
            assert part.strip("\ufffd") in text  # a window may cut a character in two
    train, held_out = (set(part.cache.document_ids) for part in (data.train, data.evaluation))
    assert train and held_out and not train & held_out


def test_fingerprint_changes_with_whatever_changes_the_samples(corpus):
    base = build_data(config_of(corpus)).fingerprint
    assert build_data(config_of(corpus)).fingerprint == base
    assert build_data(config_of(corpus, cache_dir=str(corpus.parent / "other"))).fingerprint == base
    changes = [{"seed": 1}, {"seq_len": 31}, {"in_document_attention": True}, {"eval_fraction": 0.2}]
    prints = [build_data(config_of(corpus, **change)).fingerprint for change in changes]
    corpus.write_text(corpus.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    prints.append(build_data(config_of(corpus)).fingerprint)
    assert len({base, *prints}) == 6


def test_fingerprint_has_the_seed_even_where_it_only_orders(corpus):
    first, second = (build_data(config_of(corpus, eval_fraction=0, seed=seed)).fingerprint for seed in (0, 1))
    assert first != second


def test_nothing_held_out(corpus):
    data = build_data(config_of(corpus, eval_fraction=0))
    assert data.evaluation is None and data.train.samples_per_epoch > 10


def test_too_little_held_out_text_is_an_error(corpus):
    with pytest.raises(ValueError, match=r"held_out part of the data.*lower data.seq_len, or raise data.eval_fraction"):
        build_data(config_of(corpus, seq_len=20_000))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_CACHE", raising=False)
    assert cache_root(None) == Path.home() / ".cache" / "moe"
    monkeypatch.setenv("MOE_CACHE", str(tmp_path))
    assert cache_root(None) == tmp_path
    assert cache_root("~/x") == Path.home() / "x"


_BUILD = """
import json, sys
from moe.train.data import BatchLoader, DataConfig, build_data
data = build_data(DataConfig(**json.loads(sys.argv[1])))
loader = BatchLoader(data.train, 4, 0, 1)
steps = [loader.next_step()[0] for _ in range(30)]
print(json.dumps([data.fingerprint, [s.input_ids_BL.tolist() for s in steps], [s.document_ids for s in steps]]))
"""


def start_build(config, hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _BUILD, config.model_dump_json()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("shared_cache", [False, True])
def test_two_processes_get_the_same_data(corpus, shared_cache):
    """With a cache each: runs repeat. With one cache, and both started at once: a race is harmless."""
    folders = [str(corpus.parent / ("cache" if shared_cache else f"cache{seed}")) for seed in (1, 2)]
    processes = [start_build(config_of(corpus, cache_dir=folder), seed) for seed, folder in enumerate(folders)]
    outputs = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(list(Path(folders[0], "tokens").iterdir())) == len(list(Path(folders[0], "tokenizers").iterdir())) == 1


def test_streaming(corpus, monkeypatch):
    texts = [make_text(number) for number in range(300)]
    rows = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    config = config_of(corpus, source="hub:a/b", streaming=True)
    ranks = [build_data(config, rank, 2) for rank in (0, 1)]
    assert ranks[0].fingerprint == ranks[1].fingerprint
    held_out = set(ranks[0].evaluation.cache.document_ids)
    assert held_out
    for rank, data in enumerate(ranks):
        assert isinstance(data.train, StreamingPackedDataset)
        loader = BatchLoader(data.train, 2, rank, 2, grad_accum=2)
        for _ in range(40):
            for batch in loader.next_step():
                assert not held_out & {document for ids in batch.document_ids for document in ids}
        state = json.loads(json.dumps(loader.state_dict()))
        again = BatchLoader(build_data(config, rank, 2).train, 2, rank, 2, grad_accum=2)
        again.load_state_dict(state)
        for _ in range(5):
            for mine, other in zip(again.next_step(), loader.next_step(), strict=True):
                assert mine.input_ids_BL.tolist() == other.input_ids_BL.tolist()
                assert mine.document_ids == other.document_ids


def test_real_standard_library(tmp_path):
    data = build_data(DataConfig(cache_dir=str(tmp_path), tokenizer={"vocab_size": 1024, "train_bytes": 1 << 20}))
    train, held_out = data.train.cache, data.evaluation.cache
    assert train.num_tokens > 2_000_000 and held_out.num_tokens > 20_000
    documents = {document.id: document.text for document in StdlibSource().documents()}
    assert sorted([*train.document_ids, *held_out.document_ids]) == sorted(documents)
    start, end = held_out.starts_C[0], held_out.starts_C[1]
    assert data.tokenizer.decode(held_out.tokens_N[start : end - 1]) == documents[held_out.document_ids[0]]
