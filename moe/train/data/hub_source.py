"""Datasets of the Hugging Face hub as a corpus: downloaded (`HubSource`) or read while training (`StreamSource`)."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moe.train.data.config import HUB_PREFIX
from moe.train.data.documents import Document, is_blank, limit_text, row_text

if TYPE_CHECKING:
    import datasets

STREAM_HEAD_BYTES = 32 << 20


@dataclass(frozen=True)
class HubSource:
    """A downloaded dataset; ids are `<name>#<row>`."""

    name: str
    hub_config: str | None
    split: str
    text_column: str

    @property
    def label(self) -> str:
        """As in `data.source`."""
        return f"{HUB_PREFIX}{self.name}"

    def documents(self) -> Iterator[Document]:
        """In the order of the rows."""
        for number, row in enumerate(self._rows):
            text = row_text(row, self.text_column, self.label)
            if not is_blank(text):
                yield Document(f"{self.name}#{number}", text)

    def identity(self) -> Any:
        """The name and the downloaded files; their addresses hold the dataset's revision."""
        files = sorted(self._rows.info.download_checksums or {})
        return ["hub", self.name, self.hub_config, self.split, self.text_column, self._rows.num_rows, files]

    @cached_property
    def _rows(self) -> "datasets.Dataset":
        return _load(self.name, self.hub_config, self.split, streaming=False)


@dataclass(frozen=True)
class StreamSource:
    """A dataset that is never stored; `documents()` is its head only, to train a tokenizer and to evaluate on.

    Ids come from the text (`<name>#<hash>`): a rank that reads some of the shards cannot know row numbers. So a
    document that occurs twice is on the same side of the held-out split both times.
    """

    name: str
    hub_config: str | None
    split: str
    text_column: str
    head_bytes: int = STREAM_HEAD_BYTES

    @property
    def label(self) -> str:
        """As in `data.source`."""
        return f"{HUB_PREFIX}{self.name}"

    def documents(self) -> Iterator[Document]:
        """The first `head_bytes` of text."""
        documents = (document for row in self.rows if (document := self.document(row)) is not None)
        yield from limit_text(documents, self.head_bytes)

    def document(self, row: Mapping[str, Any]) -> Document | None:
        """The document of a row; None if it is blank."""
        text = row_text(row, self.text_column, self.label)
        if is_blank(text):
            return None
        return Document(f"{self.name}#{hashlib.sha256(text.encode()).hexdigest()[:16]}", text)

    def identity(self) -> Any:
        """The name: what a stream holds is known only after reading it."""
        return ["stream", self.name, self.hub_config, self.split, self.text_column, self.head_bytes]

    @cached_property
    def rows(self) -> "datasets.IterableDataset":
        """The whole stream, of all ranks."""
        return _load(self.name, self.hub_config, self.split, streaming=True)


def _load(name: str, hub_config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, hub_config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.source='{HUB_PREFIX}{name}' (data.hub_config={hub_config!r}, data.split={split!r}) cannot be loaded: "
            f"{error}; check these three and the network, or use local files"
        ) from error
