import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.train.data import TokenizerConfig
from moe.train.data import tokenizer as tokenizer_module
from moe.train.data.documents import Document, Split, choose_split
from moe.train.data.tokenizer import END_OF_TEXT, load_tokenizer, make_encoder, train_tokenizer
from tests.train.data.small_data import ListSource, make_text

NOTHING_HELD_OUT = Split(seed=0, threshold=0.0)
any_text = st.text() | st.text(alphabet="a \n\t\r<|endoftext|>\x00é日😀").map(lambda text: text + END_OF_TEXT)


@given(any_text)
def test_round_trip_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(any_text)
def test_encoder_is_lossless_and_never_ends_a_document_inside_it(tokenizer, encoder, text):
    ids = encoder.encode_document(text)
    assert ids[-1] == encoder.eos_id and encoder.eos_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == text


def test_special_tokens_and_size(tokenizer, encoder):
    assert len(tokenizer) == encoder.vocab_size == 300
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


def test_making_an_encoder_leaves_the_tokenizer_as_it_is(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    make_encoder(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


def test_long_documents_are_encoded_in_pieces_that_join(tokenizer, encoder):
    text = make_text(0, 40_000)
    assert len(text) > 2 << 16
    assert tokenizer.decode(encoder.encode_document(text)[:-1]) == text


def test_held_out_documents_never_train(tmp_path):
    """Held-out texts repeat a word of their own; a tokenizer that saw it would have merged it into one token."""
    sides = choose_split(ListSource(("",) * 60), 0.2, seed=0)
    source = ListSource(
        tuple(("zyxwvut " if sides.is_held_out(f"doc{n}") else "abcdefg ") * 200 for n in range(60)),
    )
    tokenizer = load_tokenizer(TokenizerConfig(vocab_size=300), source, choose_split(source, 0.2, 0), tmp_path)
    assert len(tokenizer.encode(" abcdefg", add_special_tokens=False)) == 1
    assert len(tokenizer.encode(" zyxwvut", add_special_tokens=False)) == 8


def test_text_beyond_the_cap_does_not_train():
    documents = [Document("a", "abcdefg " * 100), Document("b", "zyxwvut " * 1000)]
    tokenizer = train_tokenizer(documents, 300, train_bytes=800)
    assert len(tokenizer.encode(" abcdefg", add_special_tokens=False)) == 1
    assert len(tokenizer.encode(" zyxwvut", add_special_tokens=False)) == 8


def test_cache_is_used_until_source_split_or_config_change(tmp_path, monkeypatch):
    calls = []
    train = train_tokenizer
    monkeypatch.setattr(tokenizer_module, "train_tokenizer", lambda *args: (calls.append(1), train(*args))[1])
    source, config = ListSource((make_text(0), make_text(1))), TokenizerConfig(vocab_size=270)

    first = load_tokenizer(config, source, NOTHING_HELD_OUT, tmp_path)
    again = load_tokenizer(config, source, NOTHING_HELD_OUT, tmp_path)
    assert len(calls) == 1
    assert make_encoder(again).fingerprint == make_encoder(first).fingerprint
    assert again.eos_token == END_OF_TEXT and isinstance(again, PreTrainedTokenizerFast)

    load_tokenizer(TokenizerConfig(vocab_size=271), source, NOTHING_HELD_OUT, tmp_path)
    load_tokenizer(config, ListSource((make_text(2),)), NOTHING_HELD_OUT, tmp_path)
    load_tokenizer(config, source, Split(0, 0.5), tmp_path)
    assert len(calls) == 4
    assert len(list((tmp_path / "tokenizers").iterdir())) == 4


def test_text_without_spaces_trains_in_reasonable_time():
    """2 s of CPU; more than 30 if the words stay whole."""
    text = "".join(random.Random(0).choices(string.ascii_letters, k=1 << 20))
    started = time.process_time()
    train_tokenizer([Document("a", text)], 2000, 1 << 20)
    assert time.process_time() - started < 15


def test_existing_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "mine")
    config = TokenizerConfig(path=str(tmp_path / "mine"))
    loaded = load_tokenizer(config, ListSource(()), NOTHING_HELD_OUT, tmp_path)
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "mine").get_vocab() == tokenizer.get_vocab()


def test_existing_tokenizer_that_truncates_and_pads_is_used_without(tokenizer):
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    encoder = make_encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT))
    text = make_text(0)
    assert encoder.encode([text])[0].tolist() == tokenizer.encode(text, add_special_tokens=False)


def test_existing_tokenizer_errors(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    backend = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "endless")
    for name, message in (("empty", "holds no tokenizer"), ("endless", "no end-of-sequence token.*set eos_token")):
        with pytest.raises(ValueError, match=f"(?s)data.tokenizer.path='.*{name}'.*{message}"):
            load_tokenizer(TokenizerConfig(path=str(tmp_path / name)), ListSource(()), NOTHING_HELD_OUT, tmp_path)
