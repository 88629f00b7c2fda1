import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.train.data.packing import PackedDataset, make_sample, permutation
from moe.train.data.token_cache import HELD_OUT, TRAIN
from tests.train.data.small_data import token_cache

corpora = st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 8)


def epoch_of(dataset, epoch=0):
    first = epoch * dataset.samples_per_epoch
    return [dataset.sample(index) for index in range(first, first + dataset.samples_per_epoch)]


@given(corpora, st.integers(1, 8), st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_windows_against_the_corpus(lengths, seq_len, seed, epoch, in_document):
    """Token n is the n-th of the cache, so each sample can be checked without knowing the order of the epoch."""
    cache = token_cache(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    is_first = np.isin(np.arange(sum(lengths)), cache.starts_C[:-1])
    successors = {}
    for sample in epoch_of(PackedDataset(cache, seq_len, seed, in_document), epoch):
        assert sample.input_ids_L.shape == sample.labels_L.shape == sample.position_ids_L.shape == (seq_len,)
        assert {sample.input_ids_L.dtype, sample.labels_L.dtype, sample.position_ids_L.dtype} == {np.dtype(np.int64)}
        position = -1
        for t, token in enumerate(sample.input_ids_L):
            label = sample.labels_L[t]
            ends = token + 1 == len(owner) or is_first[token + 1]
            assert sample.document_ids[sample.document_index_L[t]] == f"doc{owner[token]}"
            # positions restart at each document, and at the window's start
            position = 0 if in_document and is_first[token] else position + 1
            assert sample.position_ids_L[t] == position
            if ends and in_document:
                assert label == -100
            elif ends:
                assert is_first[label]
            else:
                assert label == token + 1
            if t + 1 < seq_len and label != -100:
                assert sample.input_ids_L[t + 1] == label
            assert token not in successors
            successors[token] = label
        assert len(sample.document_ids) == sample.document_index_L[-1] + 1
    assert len(successors) == (sum(lengths) - 1) // seq_len * seq_len
    labels = [label for label in successors.values() if label != -100]
    assert len(set(labels)) == len(labels), "no token is predicted twice"
    if not in_document:
        # every token is predicted but the epoch's first and fewer than L at its end
        assert sum(lengths) - len(labels) <= seq_len


def test_last_tokens_of_an_epoch_vary():
    """What one epoch drops, another has."""
    dataset = PackedDataset(token_cache([7] * 9), 20, seed=0)
    seen = {token for epoch in range(8) for sample in epoch_of(dataset, epoch) for token in sample.labels_L.tolist()}
    assert seen == set(range(63))


def inputs(dataset, indices):
    return [dataset.sample(index).input_ids_L.tolist() for index in indices]


def test_sample_depends_on_its_index_only():
    cache = token_cache([5, 30, 2, 11, 64, 1, 9])
    sequential = inputs(PackedDataset(cache, 8, seed=3), range(100))
    backwards = inputs(PackedDataset(cache, 8, seed=3), reversed(range(100)))
    assert backwards[::-1] == sequential
    assert inputs(PackedDataset(cache, 8, seed=4), range(100)) != sequential


def test_epochs_differ_and_windows_of_a_document_are_spread():
    dataset = PackedDataset(token_cache([400, 400]), 8, seed=0)
    first, second = (np.array(inputs(dataset, range(e * 99, e * 99 + 99))) for e in (0, 1))
    assert first.tolist() != second.tolist()
    neighbours = sum(after == before + 8 for before, after in zip(first[:, 0], first[1:, 0], strict=False))
    assert neighbours < 10, "windows should not come in the order of the text"


def test_without_a_seed_the_order_is_the_cache_s():
    dataset = PackedDataset(token_cache([5, 7, 9]), 4, seed=None)
    assert inputs(dataset, range(5)) == [list(range(i, i + 4)) for i in (0, 4, 8, 12, 16)]
    assert inputs(dataset, range(5, 10)) == inputs(dataset, range(5))


def test_ranks_share_the_samples():
    dataset = PackedDataset(token_cache([50, 50]), 4, seed=0)
    parts = [dataset.rank_samples(12, 3, rank, 2) for rank in (0, 1)]
    assert [sample.input_ids_L.tolist() for part in parts for sample in part] == inputs(dataset, range(12, 18))


def test_document_that_has_only_the_last_label_is_not_listed():
    sample = make_sample(np.arange(5), [4, 1], ["a", "b"], in_document_attention=True)
    assert sample.document_ids == ["a"]
    assert sample.labels_L.tolist() == [1, 2, 3, -100]


@pytest.mark.parametrize(("name", "remedy"), [(TRAIN, "give more text"), (HELD_OUT, "raise data.eval_fraction")])
def test_too_short_a_corpus_is_an_error(name, remedy):
    with pytest.raises(ValueError, match=rf"{name} part .* has 16 tokens.* 17 .*seq_len=16.*lower.*{remedy}"):
        PackedDataset(token_cache([10, 6], name), 16, seed=0)
    assert PackedDataset(token_cache([10, 6], name), 15, seed=0).samples_per_epoch == 1


@given(st.integers(0, 300), st.text())
def test_permutation_is_one(size, key):
    assert sorted(permutation(size, key)) == list(range(size))


def test_permutation_never_changes():
    """A new value would make resumed runs repeat samples and miss others."""
    assert permutation(8, "documents:0:0").tolist() == [1, 4, 7, 5, 0, 6, 3, 2]
    assert permutation(8, "documents:0:1").tolist() != [1, 4, 7, 5, 0, 6, 3, 2]


def test_permutation_is_unbiased():
    firsts = np.bincount([permutation(10, str(key))[0] for key in range(3000)], minlength=10)
    assert abs(firsts - 300).max() < 5 * np.sqrt(300)
