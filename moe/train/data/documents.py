"""Documents, the sources they come from, and which of them are held out.

A document is held out when a hash of its id and the seed falls below a threshold: the choice depends on nothing else,
so it survives reordering, other machines and other Python hash seeds, and a document stays on its side when the
corpus grows.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Document:
    """One text; `id` is unique within its source and does not depend on the machine."""

    id: str
    text: str


class Source(Protocol):
    """Documents in an order that never changes."""

    @property
    def label(self) -> str:
        """What the user wrote in `data.source`, for messages."""

    def documents(self) -> Iterator[Document]:
        """All documents that are not blank; each call starts from the first."""

    def identity(self) -> Any:
        """JSON-serialisable; changes when the documents may have changed. Keys the caches."""


@dataclass(frozen=True)
class Split:
    """Sends every document to training or to the held-out part."""

    seed: int
    threshold: float

    def is_held_out(self, document_id: str) -> bool:
        """Depends on the id, the seed and the threshold only."""
        return unit_hash(document_id, self.seed) < self.threshold


def unit_hash(document_id: str, seed: int) -> float:
    """A number in [0, 1), uniform over ids; the same in every process."""
    digest = hashlib.sha256(f"{seed}:{document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_split(source: Source, eval_fraction: float, seed: int) -> Split:
    """The split whose held-out share is about `eval_fraction`, moved where needed so that neither side is empty.

    Reads documents only until both sides have one, which for most corpora is a few dozen. A small corpus in which
    the hash puts all documents on one side gives up its closest one. ValueError: fewer documents than sides.
    """
    lowest, highest, count = 1.0, 0.0, 0
    for document in itertools.islice(source.documents(), 1 if eval_fraction == 0 else None):
        value = unit_hash(document.id, seed)
        lowest, highest, count = min(lowest, value), max(highest, value), count + 1
        if lowest < eval_fraction <= highest:
            return Split(seed, eval_fraction)
    if count == 0:
        raise ValueError(f"data.source={source.label!r} has no text: give files or rows that are not empty")
    if eval_fraction == 0:
        return Split(seed, 0.0)
    if count == 1:
        raise ValueError(
            f"data.source={source.label!r} has one document, which cannot be trained on and held out at once: "
            f"set data.eval_fraction=0 (it is {eval_fraction}), or give more documents"
        )
    return Split(seed, highest if highest < eval_fraction else math.nextafter(lowest, 1.0))


def limit_text(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """The first documents, up to and including the one with which their text reaches `max_bytes` of UTF-8."""
    total = 0
    for document in documents:
        yield document
        total += len(document.text.encode())
        if total >= max_bytes:
            return


def is_blank(text: str) -> bool:
    """Whether there is nothing to learn from the text; such documents are skipped everywhere."""
    return not text or text.isspace()


def row_text(row: Mapping[str, Any], text_column: str, where: str) -> str:
    """The text of one row; null counts as empty. ValueError: no such column, or not a string."""
    if text_column not in row:
        raise missing_column(text_column, row, where)
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"data.text_column={text_column!r} of {where} holds {type(text).__name__}, not text: "
            "name a column of strings in data.text_column"
        )
    return text


def missing_column(text_column: str, columns: Iterable[str], where: str) -> ValueError:
    """The error for a data set without the column that was asked for."""
    return ValueError(
        f"{where} has no column {text_column!r}; it has {', '.join(sorted(columns)) or 'none'}: "
        "set data.text_column to the one that holds the text"
    )
