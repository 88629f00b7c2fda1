"""The token cache: a corpus tokenised once, memory-mapped from then on.

A folder holds, for each of the two parts (training, held out), the tokens of all documents one after another, each
ended by the end-of-text token (uint16 if the vocabulary allows, else uint32), where each document starts, and its id.
The folder is keyed by the source, the tokenizer and the split. The fingerprint is a hash of what the files hold, so it
is the same on two machines with the same text, whatever their paths and file times.

Shape legend: N tokens of a part, C documents (C + 1 boundaries).
"""

import hashlib
import json
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe.train.data.cache_folder import content_key, publish
from moe.train.data.documents import Source, Split
from moe.train.data.pieces import text_pieces
from moe.train.data.tokenizer import Encoder

TRAIN, HELD_OUT = "train", "held_out"
# Raise when the files or the way documents are cut change, so that old caches are not used.
_FORMAT = 1
_BATCH_CHARS = 4 << 20
_BATCH_PIECES = 4096
_SECONDS_UNTIL_PROGRESS = 3.0


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one part of a corpus."""

    name: str
    tokens_N: np.ndarray
    starts_C: np.ndarray  # C + 1 boundaries, int64: document c is tokens_N[starts_C[c]:starts_C[c + 1]]
    document_ids: Sequence[str]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens, ends of documents included."""
        return len(self.tokens_N)

    @property
    def num_documents(self) -> int:
        """Documents that are not blank."""
        return len(self.document_ids)


@dataclass(frozen=True)
class TokenCaches:
    """Both parts of a corpus; `held_out` is empty if nothing is held out."""

    train: TokenCache
    held_out: TokenCache


class PackedStrings(Sequence[str]):
    """Strings in one buffer of UTF-8: a hundred million ids stay on disk."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._data[start : self._ends[index]].tobytes().decode()


def load_token_caches(source: Source, split: Split, encoder: Encoder, root: Path) -> TokenCaches:
    """Both parts of the source, from the cache under `root`; built there first if they are not."""
    key = [_FORMAT, source.identity(), split.seed, split.threshold, encoder.fingerprint]
    folder = root / "tokens" / content_key(key)
    if not folder.is_dir():
        publish(folder, lambda temporary: _write_caches(source, split, encoder, temporary))
    return TokenCaches(_open_cache(folder, TRAIN), _open_cache(folder, HELD_OUT))


def _write_caches(source: Source, split: Split, encoder: Encoder, folder: Path) -> None:
    with ExitStack() as stack:
        train = stack.enter_context(_PartWriter(folder, TRAIN, encoder))
        held_out = stack.enter_context(_PartWriter(folder, HELD_OUT, encoder))
        progress = stack.enter_context(_SlowProgress(source.label))
        for batch in _batches(_pieces(source, split, train, held_out)):
            for piece, ids in zip(batch, encoder.encode([piece.text for piece in batch]), strict=True):
                piece.writer.add(ids)
                if piece.ends_document is not None:
                    piece.writer.end_document(piece.ends_document)
            progress.update(train.num_tokens + held_out.num_tokens)


@dataclass(frozen=True)
class _Piece:
    text: str
    writer: "_PartWriter"
    ends_document: str | None  # the document's id, on its last piece


def _pieces(source: Source, split: Split, train: "_PartWriter", held_out: "_PartWriter") -> Iterator[_Piece]:
    for document in source.documents():
        writer = held_out if split.is_held_out(document.id) else train
        texts = list(text_pieces(document.text))
        for text in texts[:-1]:
            yield _Piece(text, writer, None)
        yield _Piece(texts[-1], writer, document.id)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Enough work for all cores in one call of the tokenizer, little enough for memory."""
    batch: list[_Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _PartWriter:
    """Writes one part's files; the last of them, `<part>.json`, when the with block ends without an error."""

    def __init__(self, folder: Path, name: str, encoder: Encoder) -> None:
        self._folder, self._name = folder, name
        self._dtype = np.dtype(np.uint16 if encoder.vocab_size < 1 << 16 else np.uint32)
        self._eos = np.array([encoder.eos_id])
        self._starts, self._id_ends = array("q", [0]), array("q")
        self._id_bytes = 0
        self._hash = hashlib.sha256()
        self.num_tokens = 0

    def __enter__(self) -> "_PartWriter":
        self._tokens = _part_file(self._folder, self._name, "tokens").open("wb")
        self._ids = _part_file(self._folder, self._name, "ids").open("wb")
        return self

    def add(self, ids: np.ndarray) -> None:
        """Append tokens to the current document."""
        data = ids.astype(self._dtype).tobytes()
        self._tokens.write(data)
        self._hash.update(data)
        self.num_tokens += len(ids)

    def end_document(self, document_id: str) -> None:
        """Append the end of text, and name the document."""
        self.add(self._eos)
        self._starts.append(self.num_tokens)
        data = document_id.encode()
        self._ids.write(data)
        self._hash.update(data)
        self._id_bytes += len(data)
        self._id_ends.append(self._id_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._ids.close()
        if error is not None:
            return
        for what, values in (("starts", self._starts), ("id_ends", self._id_ends)):
            data = np.array(values, dtype=np.int64).tobytes()
            self._hash.update(data)
            _part_file(self._folder, self._name, what).write_bytes(data)
        record = {"dtype": self._dtype.name, "tokens": self.num_tokens, "documents": len(self._id_ends)}
        record |= {"id_bytes": self._id_bytes, "fingerprint": self._hash.hexdigest()}
        _part_file(self._folder, self._name, "json").write_text(json.dumps(record))


def _part_file(folder: Path, name: str, what: str) -> Path:
    return folder / f"{name}.{what}"


def _open_cache(folder: Path, name: str) -> TokenCache:
    record = json.loads(_part_file(folder, name, "json").read_text())

    def array_of(what: str, dtype: str, length: int) -> np.ndarray:
        path = _part_file(folder, name, what)
        expected = length * np.dtype(dtype).itemsize
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, not {expected}: the token cache is damaged; "
                f"delete the folder {folder} and it will be built again"
            )
        # an empty file cannot be mapped
        return np.memmap(path, dtype=dtype, mode="r") if length else np.empty(0, dtype=dtype)

    ids = PackedStrings(array_of("ids", "uint8", record["id_bytes"]), array_of("id_ends", "int64", record["documents"]))
    return TokenCache(
        name=name,
        tokens_N=array_of("tokens", record["dtype"], record["tokens"]),
        starts_C=array_of("starts", "int64", record["documents"] + 1),
        document_ids=ids,
        fingerprint=record["fingerprint"],
    )


class _SlowProgress:
    """A line on stderr with the number of tokens, once the work has taken a few seconds."""

    def __init__(self, label: str) -> None:
        text = TextColumn("tokenised {task.completed:,} tokens of {task.description}", markup=False)
        self._bar = Progress(SpinnerColumn(), TimeElapsedColumn(), text, console=Console(stderr=True))
        self._task = self._bar.add_task(label, total=None)
        self._since = time.monotonic()

    def __enter__(self) -> "_SlowProgress":
        return self

    def update(self, tokens: int) -> None:
        """Show the total so far."""
        self._bar.update(self._task, completed=tokens)
        if not self._bar.live.is_started and time.monotonic() - self._since > _SECONDS_UNTIL_PROGRESS:
            self._bar.start()

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
