"""From a run's config to its model, and what else is told by both."""

import tempfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from moe.experts import set_ffn_options
from moe.layer import moe_layers
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel.ranks import Ranks
from moe.routers import parse_router
from moe.scaling import mup
from moe.train.config import RunConfig
from moe.train.data import PackedDataset, StreamingPackedDataset
from moe.types import FFNOptions

_COUNTED_AT_ONCE = 1 << 24


def build_config(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The Hugging Face config of the run's model.

    Raises:
        ValueError: the decoder's vocabulary or positions are too small for the data.
    """
    if config.model.init_from is not None:
        model_config = AutoConfig.from_pretrained(config.model.init_from)
        decoder = model_config.get_text_config()
        _check_same_base(config, getattr(model_config, "mup", None))
    else:
        fields = {"vocab_size": len(tokenizer), **config.model.decoder}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(key, tokenizer.eos_token_id)
        decoder = AutoConfig.for_model(**fields)
        model_config = (
            decoder if config.moe is None else MoEConfig(text_config=decoder, moe=_with_vocab_size(config.moe, decoder))
        )
        if (base := config.parametrization.base) is not None:
            mup.check_base(base, model_config)
            model_config.mup = base
    if decoder.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.decoder.vocab_size={decoder.vocab_size} is below the tokenizer's {len(tokenizer)}; raise or remove it"
        )
    if decoder.max_position_embeddings < config.data.seq_len:
        raise ValueError(
            f"model.decoder.max_position_embeddings={decoder.max_position_embeddings} is below data.seq_len="
            f"{config.data.seq_len}; raise it"
        )
    return model_config


def _check_same_base(config: RunConfig, saved: dict[str, int] | None) -> None:
    """A model keeps the parametrization that it was made with."""
    asked = config.parametrization.base
    if asked is not None and asked != saved:
        made = "the standard parametrization" if saved is None else f"parametrization.base={saved}"
        raise ValueError(
            f"model.init_from={config.model.init_from} was made with {made}, not with parametrization.base={asked}; remove "
            "parametrization: the model's own is used"
        )


def _with_vocab_size(moe: dict[str, Any], decoder: PreTrainedConfig) -> dict[str, Any]:
    """The spec with the vocabulary's size for a router that has that option and was not given it."""
    _, router_config = parse_router(moe["router"])
    if getattr(router_config, "vocab_size", 0) is not None:
        return moe
    return {**moe, "router": {**moe["router"], "vocab_size": decoder.vocab_size}}


def build_model(config: RunConfig, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The model on CPU in fp32, with all experts; the same on every rank for the same seed."""
    torch.manual_seed(config.seed)
    if config.model.init_from is not None:
        model = AutoModelForCausalLM.from_pretrained(config.model.init_from, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        if not isinstance(model, MoEForCausalLM):  # ours does so itself
            mup.scale_initial(model)
    model.config.use_cache = False
    if config.optim.freeze_routers:
        for layer in moe_layers(model).values():
            layer.router.requires_grad_(False)
    set_ffn_options(
        model, FFNOptions(recompute=config.train.recompute_experts, fp8=config.train.expert_precision == "fp8")
    )
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@runtime_checkable
class MadeFromTokenCounts(Protocol):
    """A router that is made from how often each token id occurs in the training data."""

    needs_token_counts: bool

    def set_token_counts(self, counts_V: Tensor) -> None:
        """Take the (V,) int64 counts."""


def give_token_counts(
    model: nn.Module, vocab_size: int, dataset: PackedDataset | StreamingPackedDataset, ranks: Ranks
) -> None:
    """Count the training tokens for the routers that still need it; those of a loaded model do not. Collective.

    Raises:
        ValueError: the data is a stream, which nobody has counted.
    """
    routers = [layer.router for layer in moe_layers(model).values()]
    waiting = [router for router in routers if isinstance(router, MadeFromTokenCounts) and router.needs_token_counts]
    if not waiting:
        return
    if isinstance(dataset, StreamingPackedDataset):
        raise ValueError(
            "data.streaming=true does not go with a router that is made from the token counts of the training data "
            "(moe.router.method=balanced); set data.streaming=false, or moe.router.method=random"
        )
    counts_V = ranks.sum_tensor(count_tokens(dataset.cache.tokens_N, vocab_size, ranks).to(ranks.device))
    for router in waiting:
        router.set_token_counts(counts_V)


def count_tokens(tokens_N: np.ndarray, vocab_size: int, ranks: Ranks) -> Tensor:
    """(V,) int64 occurrences of each id in this rank's part of the tokens."""
    begin, end = (len(tokens_N) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for start in range(begin, end, _COUNTED_AT_ONCE):  # the tokens lie on disk, and counting widens them
        counts_V += np.bincount(tokens_N[start : min(start + _COUNTED_AT_ONCE, end)], minlength=vocab_size)
    return torch.from_numpy(counts_V)


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """The files of a saved tokenizer, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def model_difference(saved: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """First setting in which the model config of a checkpoint differs from this run's; None where they are one model.

    Balance losses are no part of the model: a run may go on with others.
    """
    found, expected = (_flat(AutoConfig.for_model(**values).to_dict()) for values in (saved, ours))
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key) and not key.startswith("moe.balance."):
            return f"{key} is {found.get(key)!r} there and {expected.get(key)!r} here"
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in ("use_cache", "dtype", "transformers_version", "_name_or_path"):  # not what is computed
            flat[f"{prefix}{key}"] = value
    return flat


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Sizes: "total_params"; "active_params", those a token is multiplied with or looks up; "matmul_params", without lookups."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        per_expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.num_experts
        idle += round(per_expert * max(layer.num_experts - layer.router.mean_experts_per_token, 0))
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tied = model.get_output_embeddings().weight is embedding.weight  # type: ignore[operator]
    lookup = 0 if tied else embedding.weight.numel()
    return {"total_params": total, "active_params": total - idle, "matmul_params": total - idle - lookup}
