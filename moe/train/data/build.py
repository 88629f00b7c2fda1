"""From a `DataConfig` to everything a trainer needs of its data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe.train.data.cache_folder import cache_root, content_key
from moe.train.data.config import DataConfig
from moe.train.data.documents import choose_split
from moe.train.data.hub_source import StreamSource
from moe.train.data.packing import PackedDataset
from moe.train.data.sources import open_source
from moe.train.data.streaming import StreamingPackedDataset
from moe.train.data.token_cache import load_token_caches
from moe.train.data.tokenizer import load_tokenizer, make_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class DataBundle:
    """`fingerprint` belongs in the checkpoint: it differs if a resumed run would see other data.

    `evaluation` is None if nothing is held out.
    """

    tokenizer: "PreTrainedTokenizerFast"
    train: PackedDataset | StreamingPackedDataset
    evaluation: PackedDataset | None
    fingerprint: str


def build_data(config: DataConfig, rank: int = 0, world_size: int = 1) -> DataBundle:
    """Open the source, and load the tokenizer and the tokens from the cache, building there what is missing.

    Let one rank of each machine go first, and the others find the caches; at once is harmless, but repeats the work.
    Only a stream depends on `rank` and `world_size`. ValueError: no data, or too little.
    """
    source = open_source(config)
    root = cache_root(config.cache_dir)
    split = choose_split(source, config.eval_fraction, config.seed)
    tokenizer = load_tokenizer(config.tokenizer, source, split, root)
    encoder = make_encoder(tokenizer)
    # Of a stream, this is the head: its held-out documents are what the run evaluates on.
    caches = load_token_caches(source, split, encoder, root)
    seq_len, in_document = config.seq_len, config.in_document_attention
    train: PackedDataset | StreamingPackedDataset
    if isinstance(source, StreamSource):
        train = StreamingPackedDataset(
            source.rows, source.document, split, encoder, seq_len, rank, world_size, in_document
        )
    else:
        train = PackedDataset(caches.train, seq_len, config.seed, in_document)
    evaluation = PackedDataset(caches.held_out, seq_len, None, in_document) if config.eval_fraction else None
    parts = [caches.train.fingerprint, caches.held_out.fingerprint, encoder.fingerprint]
    fingerprint = content_key([parts, config.streaming, config.seed, seq_len, in_document])
    return DataBundle(tokenizer, train, evaluation, fingerprint)
