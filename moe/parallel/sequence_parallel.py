"""Sequence parallelism: each rank holds a piece of every sequence, and attention sees it whole, for some of the heads.

The attention is DeepSpeed's Ulysses (arXiv 2309.14509, with the changes of arXiv 2506.13996): one all-to-all before it turns
pieces of the sequence with all heads into whole sequences with some heads, and one after it turns them back. Everything
else, the experts among it, works on single tokens and does not notice.

To the engine all ranks are data-parallel: a loss that is divided by what all ranks count once gives the right gradients
whether ranks hold other sequences or other pieces of one. So every ZeRO stage and expert-parallel degree goes with it.

Legend: B sequences, L whole length, l = L / S length of a piece, S ranks that share a sequence.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe.layer import moe_layers

# Of a decoder's config: what would need to be known of the positions that another rank holds.
_NEUTRAL = {"sliding_window": None, "attention_chunk_size": None}


class SequenceParallel:
    """Ranks s * size ... (s + 1) * size - 1 share their sequences; rank i of them holds the i-th piece. Made on all ranks.

    Args:
        size: S; 1 does nothing.

    Attributes:
        rank: this process's place among those that share its sequences.
        data_rank, data_size: place among, and number of, groups of ranks with sequences of their own.

    Raises:
        ValueError: the number of processes is not divisible by ``size``.
    """

    def __init__(self, size: int) -> None:
        world_size = dist.get_world_size()
        if world_size % size:
            raise ValueError(
                f"parallel.sp_size={size} does not divide the {world_size} processes; use a divisor or start more"
            )
        self.size, self.rank = size, dist.get_rank() % size
        self.data_rank, self.data_size = dist.get_rank() // size, world_size // size
        self._replaced: dict[str, Any] = {}
        self._by_batch: dict[int, nn.Module] = {}
        self._group: dist.ProcessGroup | None = None
        if size == 1:
            return
        for first in range(0, world_size, size):
            group = dist.new_group(list(range(first, first + size)))
            if first == self.data_rank * size:
                self._group = group

    def piece(self, tensor_BL: Tensor) -> Tensor:
        """This rank's (B, l) of (B, L)."""
        length = tensor_BL.shape[1]
        if length % self.size:
            raise ValueError(
                f"data.seq_len={length} is not divisible by parallel.sp_size={self.size}; change one of them"
            )
        piece = length // self.size
        return tensor_BL[:, self.rank * piece : (self.rank + 1) * piece].contiguous()

    def install(self, model: nn.Module) -> None:
        """Let the attention of this process's models, of ``model``'s sizes, exchange with the other ranks until `remove`.

        Raises:
            ValueError: the model does not allow it; the message says what to change.
        """
        if self.size == 1:
            return
        assert not self._replaced, "installed already"
        config = _checked_config(model, self.size)
        name = config._attn_implementation
        inner = self._replaced[name] = ALL_ATTENTION_FUNCTIONS[name]

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            # A mask made by transformers is of the pieces: causal attention of the whole needs none. One that the caller made
            # for whole sequences, as for documents, stays.
            whole = query.shape[2] * self.size
            if mask is not None and mask.shape[-2:] != (whole, whole):
                mask = None
            num_groups = getattr(module, "num_key_value_groups", None)
            try:
                return self._attention(query.shape[0], config, inner)(module, query, key, value, mask, *args, **kwargs)
            finally:  # DeepSpeed's attention leaves its own there where it repeats keys and values
                if num_groups is not None:
                    module.num_key_value_groups = num_groups

        ALL_ATTENTION_FUNCTIONS[name] = attend

    def remove(self) -> None:
        """Undo `install`: this process's models attend to what they are given again."""
        for name, inner in self._replaced.items():
            ALL_ATTENTION_FUNCTIONS[name] = inner
        self._replaced.clear()
        self._by_batch.clear()

    def _attention(self, batch_size: int, config: PretrainedConfig, inner: Any) -> nn.Module:
        """DeepSpeed's module is made for one batch size."""
        if batch_size not in self._by_batch:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            self._by_batch[batch_size] = UlyssesSPAttentionHF(
                attn=inner,
                batch_size=batch_size,
                attn_head_count=config.num_attention_heads,
                attn_head_size=_head_dim(config),
                kv_head_count=config.num_key_value_heads,
                num_hidden_layers=config.num_hidden_layers,
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._by_batch[batch_size]


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _checked_config(model: nn.Module, size: int) -> PretrainedConfig:
    whole: Any = model.config
    config = whole.get_text_config()
    implementation = config._attn_implementation
    if implementation == "eager":
        raise ValueError(
            f"parallel.sp_size={size} needs an attention that takes no mask for a causal one, and this model's is eager; "
            "use sdpa or flash_attention_2"
        )
    for name, neutral in _NEUTRAL.items():
        if getattr(config, name, neutral) != neutral:
            raise ValueError(
                f"model.decoder.{name}={getattr(config, name)} is not possible with parallel.sp_size={size}, which drops "
                f"masks; set it to {'null' if neutral is None else neutral}, or parallel.sp_size=1"
            )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        raise ValueError(f"model.decoder.num_attention_heads={heads} is not divisible by parallel.sp_size={size}")
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"model.decoder.num_key_value_heads={kv_heads} and parallel.sp_size={size}: one must divide the other"
        )
    for layer in moe_layers(model).values():
        balance = layer.spec.balance
        if balance.aux_coef and balance.aux_scope == "sequence" and layer.router.takes_balance_loss:
            raise ValueError(
                f"moe.balance.aux_scope=sequence needs whole sequences, and parallel.sp_size={size} splits them; use "
                "global_batch or micro_batch"
            )
    return config
