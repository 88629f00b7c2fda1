"""Cut the tokens of a corpus into windows of equal length, without padding and without losing a token.

The documents of an epoch, in an order drawn from (seed, epoch), are laid end to end and cut into windows of L + 1
tokens at a stride of L: each window's first L tokens are the inputs and its last L the labels, so every token but the
epoch's first is predicted exactly once; fewer than L tokens at an epoch's end wait for another epoch's order. The
windows are then visited in an order of their own: else a step would see many neighbouring windows of one long document,
which makes its gradient noisy and a router's load unlike the corpus'.

Sample i is computed from i alone, so a run resumes at any sample, and ranks agree without talking, however many there
are. With `in_document_attention`, a window is a row of separate documents (as in Llama 3's training, arXiv:2407.21783
section 3.2): positions start at 0 in each, and no token is predicted from another document.

Shape legend: L window length, C documents, W windows of an epoch, N tokens.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.train.data.token_cache import HELD_OUT, TokenCache

IGNORED_LABEL = -100  # what torch's and transformers' cross entropy leaves out


@dataclass(frozen=True)
class Sample:
    """One window; all arrays are int64 of length L."""

    input_ids_L: np.ndarray
    labels_L: np.ndarray  # label at t is the token at t + 1; IGNORED_LABEL where it is not to be learnt
    position_ids_L: np.ndarray
    document_index_L: np.ndarray  # which of `document_ids` the token at t belongs to
    document_ids: list[str]


def make_sample(
    tokens_L1: np.ndarray, lengths: Sequence[int], document_ids: list[str], in_document_attention: bool
) -> Sample:
    """A sample from L + 1 tokens, of which the first `lengths[0]` belong to `document_ids[0]`, and so on."""
    index_L1 = np.repeat(np.arange(len(lengths)), lengths)
    assert len(index_L1) == len(tokens_L1), "every token belongs to a document"
    labels_L = tokens_L1[1:].astype(np.int64)
    position_ids_L = np.arange(len(labels_L))
    if in_document_attention:
        is_first_L = np.diff(index_L1[:-1], prepend=-1) > 0
        position_ids_L = position_ids_L - np.maximum.accumulate(np.where(is_first_L, position_ids_L, 0))
        labels_L[index_L1[1:] != index_L1[:-1]] = IGNORED_LABEL
    # The last token is a label only; its document may have no input in this window.
    document_ids = document_ids[: index_L1[-2] + 1]
    return Sample(tokens_L1[:-1].astype(np.int64), labels_L, position_ids_L, index_L1[:-1], document_ids)


@dataclass(frozen=True)
class _EpochOrder:
    documents_C: np.ndarray
    starts_C: np.ndarray  # C + 1 boundaries of the documents, laid in that order
    windows_W: np.ndarray


class PackedDataset:
    """Windows of a token cache, addressed by a global sample index that runs through all epochs.

    `seed=None` keeps the order of the cache (for evaluation). An epoch's order takes 16 bytes per document and 8 per
    window in each process.
    """

    def __init__(self, cache: TokenCache, seq_len: int, seed: int | None, in_document_attention: bool = False) -> None:
        if cache.num_tokens < seq_len + 1:
            remedy = "raise data.eval_fraction" if cache.name == HELD_OUT else "give more text"
            raise ValueError(
                f"the {cache.name} part of the data has {cache.num_tokens} tokens, fewer than one window of "
                f"{seq_len + 1} (data.seq_len={seq_len} and the last label): lower data.seq_len, or {remedy}"
            )
        self.cache = cache
        self.seq_len = seq_len
        self.in_document_attention = in_document_attention
        self.samples_per_epoch = (cache.num_tokens - 1) // seq_len
        self._seed = seed
        # A step may cross from one epoch into the next, never into a third unless the corpus is tiny.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 of the run, of epoch `index // samples_per_epoch`; O(log C) and the window itself."""
        assert index >= 0, index
        epoch, window = divmod(index, self.samples_per_epoch)
        order = self._order(epoch)
        begin = int(order.windows_W[window]) * self.seq_len
        end = begin + self.seq_len + 1
        place = int(np.searchsorted(order.starts_C, begin, side="right")) - 1
        parts, lengths, ids = [], [], []
        while begin < end:
            document = int(order.documents_C[place])
            stop = min(end, int(order.starts_C[place + 1]))
            offset = int(self.cache.starts_C[document]) - int(order.starts_C[place])
            parts.append(self.cache.tokens_N[begin + offset : stop + offset])
            lengths.append(stop - begin)
            ids.append(self.cache.document_ids[document])
            begin, place = stop, place + 1
        return make_sample(np.concatenate(parts), lengths, ids, self.in_document_attention)

    def rank_samples(self, first: int, count: int, rank: int, world_size: int) -> list[Sample]:
        """This rank's `count` of the `count * world_size` samples from `first` on."""
        begin = first + rank * count
        return [self.sample(index) for index in range(begin, begin + count)]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: samples depend on their index only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of a stream cannot be continued here."""
        if state:
            raise ValueError("the checkpoint is of a streaming run: set data.streaming=true to resume it")

    def _make_order(self, epoch: int) -> _EpochOrder:
        num_documents = self.cache.num_documents
        documents_C, windows_W = np.arange(num_documents), np.arange(self.samples_per_epoch)
        if self._seed is not None:
            documents_C = permutation(num_documents, f"documents:{self._seed}:{epoch}")
            windows_W = permutation(self.samples_per_epoch, f"windows:{self._seed}:{epoch}")
        starts_C = np.zeros(num_documents + 1, dtype=np.int64)
        np.cumsum(np.diff(self.cache.starts_C)[documents_C], out=starts_C[1:])
        return _EpochOrder(documents_C, starts_C, windows_W)


def permutation(size: int, key: str) -> np.ndarray:
    """A permutation of `range(size)` that depends on `key` alone.

    Sorts by splitmix64 (Steele, Lea and Flood, OOPSLA 2014) and not with numpy's generators, whose streams may change
    between versions of numpy: a resumed run must see the samples it has not seen.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
