"""Windows from a stream: for corpora too large to tokenise beforehand.

Every rank reads its own share of the documents, tokenises them as they come and packs them in that order. The position
of the stream and the tokens read but not yet used are the state, so resuming is exact, at the same number of ranks.
What a stream cannot give: a global order of samples, and an order of documents other than the stream's (a shuffle
buffer is not part of a stream's state, so it would make resuming inexact). From the second pass on, `datasets` reads
the shards in another order.

Shape legend: L window length.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.train.data.documents import Document, Split
from moe.train.data.packing import Sample, make_sample
from moe.train.data.tokenizer import Encoder

if TYPE_CHECKING:
    import datasets


class StreamingPackedDataset:
    """This rank's windows of an endless repetition of a stream.

    `to_document` turns a row into its document, or None to skip it; held-out documents are skipped too.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        to_document: Callable[[Mapping[str, Any]], Document | None],
        split: Split,
        encoder: Encoder,
        seq_len: int,
        rank: int,
        world_size: int,
        in_document_attention: bool = False,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.seq_len = seq_len
        self.in_document_attention = in_document_attention
        self._rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        self._to_document, self._split, self._encoder = to_document, split, encoder
        self._rank, self._world_size = rank, world_size
        self._rows_state = self._rows.state_dict()
        self._documents: Iterator[Document] | None = None  # of the current pass; None: not begun
        self._epoch = 0
        self._tokens = np.empty(0, dtype=np.int64)
        self._used = 0
        self._lengths: deque[tuple[str, int]] = deque()  # documents of the unused tokens, and how many each has

    def next_sample(self) -> Sample:
        """The next window of this rank."""
        while len(self._tokens) - self._used < self.seq_len + 1:
            self._append(self._next_document())
        tokens_L1 = self._tokens[self._used : self._used + self.seq_len + 1]
        ids, lengths, missing = [], [], self.seq_len + 1
        for document_id, length in self._lengths:
            ids.append(document_id)
            lengths.append(min(length, missing))
            missing -= lengths[-1]
            if missing == 0:
                break
        self._drop(self.seq_len)  # the last token is the next window's first
        return make_sample(tokens_L1, lengths, ids, self.in_document_attention)

    def rank_samples(self, first: int, count: int, rank: int, world_size: int) -> list[Sample]:
        """The next `count` windows of this rank; a stream has no index to go to, so `first` is not used."""
        assert (rank, world_size) == (self._rank, self._world_size), "the loader and the stream differ in their rank"
        return [self.next_sample() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; each rank has its own."""
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "epoch": self._epoch,
            # until the pass has begun, the dataset does not report the state it was given
            "rows": self._rows_state if self._documents is None else self._rows.state_dict(),
            "tokens": self._tokens[self._used :].tolist(),
            "lengths": [list(entry) for entry in self._lengths],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. ValueError: it is another rank's, or not a stream's."""
        if "rows" not in state:
            raise ValueError("the checkpoint is not of a streaming run: set data.streaming=false to resume it")
        if (state["rank"], state["world_size"]) != (self._rank, self._world_size):
            raise ValueError(
                f"a stream resumes on as many ranks as it was saved on: the state is of rank {state['rank']} of "
                f"{state['world_size']}, this is rank {self._rank} of {self._world_size}; start as many ranks as then"
            )
        self._epoch = state["epoch"]
        self._rows.set_epoch(self._epoch)
        self._rows_state = state["rows"]
        self._rows.load_state_dict(self._rows_state)
        self._documents = None
        self._tokens, self._used = np.array(state["tokens"], dtype=np.int64), 0
        self._lengths = deque((document_id, length) for document_id, length in state["lengths"])

    def _next_document(self) -> Document:
        for _ in range(2):  # what is left of this pass, then a whole one
            if self._documents is None:
                self._documents = self._pass()
            for document in self._documents:
                return document
            self._documents = None
            self._epoch += 1
            self._rows.set_epoch(self._epoch)
        raise ValueError(
            f"rank {self._rank} of {self._world_size} got no training document from the stream: "
            "start fewer ranks, lower data.eval_fraction, or set data.streaming=false"
        )

    def _pass(self) -> Iterator[Document]:
        for row in self._rows:
            document = self._to_document(row)
            if document is not None and not self._split.is_held_out(document.id):
                yield document

    def _append(self, document: Document) -> None:
        ids = self._encoder.encode_document(document.text)
        self._tokens = np.concatenate([self._tokens[self._used :], ids])
        self._used = 0
        self._lengths.append((document.id, len(ids)))

    def _drop(self, count: int) -> None:
        self._used += count
        while count:
            document_id, length = self._lengths.popleft()
            if length > count:
                self._lengths.appendleft((document_id, length - count))
            count -= min(length, count)
