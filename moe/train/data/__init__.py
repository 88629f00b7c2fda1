"""Training data: documents -> tokenizer -> token cache -> windows -> batches, the same on any number of ranks.

`build_data` does all of it; the other names are its parts. Nothing here knows about processes: ranks are arguments.
"""

from moe.train.data.build import DataBundle, build_data
from moe.train.data.config import DataConfig, TokenizerConfig
from moe.train.data.loader import Batch, BatchLoader, additive_mask, eval_batches
from moe.train.data.packing import IGNORED_LABEL, PackedDataset, Sample
from moe.train.data.streaming import StreamingPackedDataset
from moe.train.data.token_cache import TokenCache

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "BatchLoader",
    "DataBundle",
    "DataConfig",
    "PackedDataset",
    "Sample",
    "StreamingPackedDataset",
    "TokenCache",
    "TokenizerConfig",
    "additive_mask",
    "build_data",
    "eval_batches",
]
