import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe.train.data.documents import Document
from moe.train.data.token_cache import TRAIN, TokenCache

WORDS = [
    "the",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sleeps",
    "quickly",
    "über",
    "naïve",
    "日本",
    "seven",
    "of",
    "and",
]


def make_text(seed: int, num_words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words)) + "\n"


@dataclass(frozen=True)
class ListSource:
    texts: tuple[str, ...]
    label: str = "list"

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(f"doc{number}", text)

    def identity(self) -> list[str]:
        return list(self.texts)


def token_cache(lengths: list[int], name: str = TRAIN) -> TokenCache:
    """Documents of the given lengths in which every token is unique: token n is the n-th of the cache."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = [f"doc{number}" for number in range(len(lengths))]
    return TokenCache(name, np.arange(starts[-1], dtype=np.uint32), starts, ids, fingerprint="test")
