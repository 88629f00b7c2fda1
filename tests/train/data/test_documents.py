import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.train.data.documents import choose_split, limit_text, unit_hash
from tests.train.data.small_data import ListSource


def sides(source, split):
    return {document.id: split.is_held_out(document.id) for document in source.documents()}


def test_hash_never_changes():
    """A new value would move documents between training and evaluation of runs that exist."""
    assert unit_hash("ast.py", 0) == 0.4834295933759722


@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0.001, 0.05, 0.5, 0.999]))
def test_neither_side_is_empty_however_small_the_corpus(seed, count, fraction):
    source = ListSource(tuple("x" * count))
    assert set(sides(source, choose_split(source, fraction, seed)).values()) == {True, False}


def test_share_is_about_the_fraction_and_depends_on_the_seed():
    source = ListSource(("x",) * 4000)
    first, second = (sides(source, choose_split(source, 0.1, seed)) for seed in (0, 1))
    assert abs(sum(first.values()) - 400) < 4 * math.sqrt(4000 * 0.1 * 0.9)
    assert first != second


def test_documents_keep_their_side_when_the_corpus_grows():
    small, large = ListSource(("x",) * 500), ListSource(("x",) * 1000)
    before, after = (sides(source, choose_split(source, 0.1, 3)) for source in (small, large))
    assert before.items() <= after.items()


def test_fraction_zero_holds_nothing_out():
    source = ListSource(("x",) * 50)
    assert not any(sides(source, choose_split(source, 0, 0)).values())


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"'list' has one document.*data.eval_fraction=0 \(it is 0.05\)"):
        choose_split(ListSource(("x",)), 0.05, 0)


@pytest.mark.parametrize("fraction", [0, 0.05])
def test_no_document_is_an_error(fraction):
    with pytest.raises(ValueError, match=r"data.source='list' has no text"):
        choose_split(ListSource(()), fraction, 0)


def test_limit_counts_bytes_and_includes_the_document_that_reaches_it():
    documents = ListSource(("é" * 5, "a", "b")).documents()
    assert [document.id for document in limit_text(documents, 11)] == ["doc0", "doc1"]
