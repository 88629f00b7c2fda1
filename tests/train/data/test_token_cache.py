import dataclasses
import os
import threading
import time

import numpy as np
import pytest

from moe.train.data import token_cache as token_cache_module
from moe.train.data.documents import Split
from moe.train.data.file_source import FileSource
from moe.train.data.token_cache import load_token_caches
from tests.train.data.small_data import ListSource, make_text

SPLIT = Split(seed=0, threshold=0.3)
TEXTS = tuple(make_text(number, num_words=5 + 7 * number) for number in range(30))


def documents_of(cache):
    bounds = cache.starts_C.tolist()
    return {
        document_id: cache.tokens_N[start:end].tolist()
        for document_id, start, end in zip(cache.document_ids, bounds[:-1], bounds[1:], strict=True)
    }


def test_both_parts_hold_their_documents_with_ends(tmp_path, tokenizer, encoder):
    source = ListSource((*TEXTS, "x", f"a {token_cache_module.TRAIN}<|endoftext|> b"))
    caches = load_token_caches(source, SPLIT, encoder, tmp_path)
    expected = {
        document.id: [*encoder.encode([document.text])[0].tolist(), tokenizer.eos_token_id]
        for document in source.documents()
    }
    train, held_out = documents_of(caches.train), documents_of(caches.held_out)
    assert train | held_out == expected
    assert train and held_out and not train.keys() & held_out.keys()
    assert all(SPLIT.is_held_out(document_id) for document_id in held_out)
    assert list(train) == [name for name in expected if name in train], "in the order of the source"
    assert caches.train.num_documents == len(train)
    assert caches.train.num_tokens == sum(map(len, train.values()))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), ((1 << 16) - 1, np.uint16), (1 << 16, np.uint32)])
def test_tokens_are_mapped_in_the_smallest_type(tmp_path, encoder, vocab_size, dtype):
    encoder = dataclasses.replace(encoder, vocab_size=vocab_size)
    tokens_N = load_token_caches(ListSource(TEXTS), SPLIT, encoder, tmp_path).train.tokens_N
    assert isinstance(tokens_N, np.memmap) and tokens_N.dtype == dtype


def test_documents_larger_than_a_piece_and_a_batch(tmp_path, tokenizer, encoder, monkeypatch):
    monkeypatch.setattr(token_cache_module, "_BATCH_CHARS", 1000)
    monkeypatch.setattr(token_cache_module, "_BATCH_PIECES", 3)
    source = ListSource((make_text(0, 40_000), *TEXTS[:10]))
    caches = load_token_caches(source, Split(0, 0.0), encoder, tmp_path)
    documents = documents_of(caches.train)
    for document in source.documents():
        assert documents[document.id] == encoder.encode_document(document.text).tolist()
        assert tokenizer.decode(documents[document.id][:-1]) == document.text
    assert caches.held_out.num_tokens == caches.held_out.num_documents == 0


@dataclasses.dataclass(frozen=True)
class CountingSource(ListSource):
    reads: list[int] = dataclasses.field(default_factory=list)

    def documents(self):
        self.reads.append(1)
        yield from super().documents()


def test_cache_is_used_until_source_tokenizer_or_split_change(tmp_path, encoder):
    source = CountingSource(TEXTS)
    first = load_token_caches(source, SPLIT, encoder, tmp_path)
    again = load_token_caches(source, SPLIT, encoder, tmp_path)
    assert len(source.reads) == 1
    assert documents_of(again.train) == documents_of(first.train)
    load_token_caches(source, Split(1, 0.3), encoder, tmp_path)
    load_token_caches(source, SPLIT, dataclasses.replace(encoder, fingerprint="other"), tmp_path)
    assert len(source.reads) == 3


def test_two_builders_at_once_agree_and_leave_nothing_behind(tmp_path, encoder):
    barrier = threading.Barrier(2, timeout=30)

    class SlowSource(ListSource):
        def documents(self):
            barrier.wait()  # both have found no cache
            yield from super().documents()

    results = []
    source = SlowSource(TEXTS)
    threads = [
        threading.Thread(target=lambda: results.append(load_token_caches(source, SPLIT, encoder, tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [documents_of(result.train) for result in results] == [documents_of(results[0].train)] * 2
    assert len(os.listdir(tmp_path / "tokens")) == 1


def test_failed_build_leaves_nothing(tmp_path, encoder):
    class BrokenSource(ListSource):
        def documents(self):
            yield from super().documents()
            raise ValueError("row 31 is bad")

    with pytest.raises(ValueError, match="row 31 is bad"):
        load_token_caches(BrokenSource(TEXTS), SPLIT, encoder, tmp_path)
    assert os.listdir(tmp_path / "tokens") == []


def test_damaged_cache_is_refused(tmp_path, encoder):
    load_token_caches(ListSource(TEXTS), SPLIT, encoder, tmp_path)
    (path,) = tmp_path.glob("tokens/*/train.tokens")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="the token cache is damaged; delete the folder"):
        load_token_caches(ListSource(TEXTS), SPLIT, encoder, tmp_path)


def test_fingerprint_is_of_the_text_and_the_cache_of_the_file(tmp_path, encoder):
    def fingerprint(folder, text, mtime):
        path = tmp_path / folder / "x.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (mtime, mtime))
        return load_token_caches(FileSource(str(path)), Split(0, 0.0), encoder, tmp_path / "cache").train.fingerprint

    first = fingerprint("a", "one two three", 1000)
    assert fingerprint("b", "one two three", 2000) == first
    assert fingerprint("a", "one two trees", 3000) != first


def test_progress_goes_to_stderr_when_it_takes_long(tmp_path, encoder, monkeypatch, capsys):
    source = ListSource(TEXTS, label="[b]list")  # not markup
    load_token_caches(source, SPLIT, encoder, tmp_path / "quick")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(token_cache_module, "_SECONDS_UNTIL_PROGRESS", 0.0)
    caches = load_token_caches(source, SPLIT, encoder, tmp_path / "slow")
    out, err = capsys.readouterr()
    assert out == ""
    assert f"tokenised {caches.train.num_tokens + caches.held_out.num_tokens:,} tokens of [b]list" in err


@pytest.mark.parametrize("megabytes", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_one_huge_line_without_spaces(tmp_path, tokenizer, encoder, megabytes):
    """Time is linear in the length. CPU time, so that a busy machine does not fail it."""
    line = "".join(make_text(0, 2000).split())
    line *= megabytes * 1_000_000 // len(line.encode())
    path = tmp_path / "x.txt"
    path.write_text(line, encoding="utf-8")
    started = time.process_time()
    caches = load_token_caches(FileSource(str(path)), SPLIT, encoder, tmp_path / "cache")
    assert time.process_time() - started < megabytes
    assert caches.train.num_documents + caches.held_out.num_documents > 60
    for cache in (caches.train, caches.held_out):
        first = tokenizer.decode(cache.tokens_N[: cache.starts_C[1] - 1])
        assert first in line and len(first) > 10_000
