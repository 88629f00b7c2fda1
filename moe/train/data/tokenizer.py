"""The tokenizer: one from Hugging Face, or a byte-level BPE trained on the training documents and cached.

Byte-level BPE (GPT-2's; Sennrich et al., arXiv:1508.07909) needs no unknown token: all 256 bytes are in the vocabulary,
so any string survives the round trip. `<|endoftext|>` ends every document, and stands in for the beginning and padding.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from moe.train.data.cache_folder import content_key, publish
from moe.train.data.config import TokenizerConfig
from moe.train.data.documents import Document, Source, Split
from moe.train.data.pieces import text_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Raise when the way tokenizers are trained changes, so that old caches are not used.
_FORMAT = 1
_LONG_RUN = re.compile(r"\S{256}|\s{256}")
_SHORT_RUNS = re.compile(r"\S{1,64}|\s{1,64}")


@dataclass(frozen=True)
class Encoder:
    """Text to token ids, for whole corpora: no special tokens are added, and none is recognised in the text."""

    backend: tokenizers.Tokenizer
    eos_id: int
    vocab_size: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int64) of every text; runs on all cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_document(self, text: str) -> np.ndarray:
        """Token ids (int64) of one document, cut into pieces as the token cache does, with the end of text."""
        return np.concatenate([*self.encode(list(text_pieces(text))), np.array([self.eos_id])])


def make_encoder(tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    """An encoder with its own copy of the tokenizer's Rust object; the tokenizer itself is left as it is."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # A document that happens to contain "<|endoftext|>" must not end there.
    backend.encode_special_tokens = True
    eos_id = tokenizer.eos_token_id
    digest = hashlib.sha256(f"{eos_id}:{backend.to_str()}".encode()).hexdigest()
    return Encoder(backend, eos_id, max(backend.get_vocab(with_added_tokens=True).values()) + 1, digest)


def load_tokenizer(config: TokenizerConfig, source: Source, split: Split, root: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer that the configuration asks for; a trained one comes from the cache under `root` if it is there."""
    if config.path is not None:
        return _existing_tokenizer(config.path)
    from transformers import PreTrainedTokenizerFast

    key = [_FORMAT, tokenizers.__version__, config.vocab_size, config.train_bytes]
    key += [split.seed, split.threshold, source.identity()]
    folder = root / "tokenizers" / content_key(key)
    if not folder.is_dir():
        documents = (document for document in source.documents() if not split.is_held_out(document.id))
        trained = train_tokenizer(documents, config.vocab_size, config.train_bytes)
        publish(folder, trained.save_pretrained)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer(documents: Iterable[Document], vocab_size: int, train_bytes: int) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on the first `train_bytes` of text; the same text gives the same tokenizer.

    A small corpus may fill less than `vocab_size`.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_texts(documents, train_bytes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _training_texts(documents: Iterable[Document], max_bytes: int) -> Iterator[str]:
    """Pieces of the documents; where there are huge words (base64, a file without spaces), short ones.

    Every merge rewrites all words that have the pair, so training on a few words of a megabyte would never end.
    """
    for piece in (piece for document in documents for piece in text_pieces(document.text)):
        if _LONG_RUN.search(piece):
            yield from _SHORT_RUNS.findall(piece)
        else:
            yield piece
        max_bytes -= len(piece.encode())
        if max_bytes <= 0:
            return


def _existing_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.tokenizer.path={path!r} holds no tokenizer that transformers can load ({error}): "
            "name a folder with tokenizer.json or a model on the hub, or leave it out to train one"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"data.tokenizer.path={path!r} has no fast (tokenizer.json) form: convert it with transformers, "
            "or name another one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.tokenizer.path={path!r} has no end-of-sequence token, which ends every document: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer
