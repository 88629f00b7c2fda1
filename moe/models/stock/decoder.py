"""The part of a decoder that is not its FFNs, described apart from what an architecture calls it.

Stock MoE architectures differ in what their attention can do. `describe` says what a decoder's does; `dense_decoder` makes
the config of the plain decoder that does it, for import.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from moe.models.config import MoEConfig

# Fields with one meaning in all architectures here.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Attention of a decoder.

    Attributes:
        qkv_bias: the query, key and value projections have a bias.
        output_bias: the output projection has one.
        qk_norm: queries and keys are normalised per head.
        windows: of each layer, how many tokens it sees; ``None`` for all.
        rotary_share: share of a head's dimensions that are rotated.
        mlp_bias: the dense FFNs have biases.
    """

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    rotary_share: float = 1.0
    mlp_bias: bool = False


def decoder_config(config: MoEConfig) -> Any:
    """The dense decoder's config; each architecture has fields of its own, hence the type."""
    assert isinstance(config.text_config, PreTrainedConfig)
    return config.text_config


def describe(config: Any) -> Decoder:
    """What a dense decoder's attention does.

    Raises:
        ValueError: the architecture is not known here.
    """
    if config.model_type not in _DESCRIBE:
        raise ValueError(
            f"text_config.model_type={config.model_type!r} is no decoder that another architecture expresses; "
            f"known are {', '.join(_DESCRIBE)}"
        )
    return _DESCRIBE[config.model_type](config)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Sliding windows of the layers; one that holds every position of the model is none."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or None
    if window is not None and window >= config.max_position_embeddings:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rotary_share(config: Any) -> float:
    return float(config.rope_parameters.get("partial_rotary_factor", 1.0))


_DESCRIBE: dict[str, Callable[[Any], Decoder]] = {
    "llama": lambda c: Decoder(
        windows=(None,) * c.num_hidden_layers,
        qkv_bias=c.attention_bias,
        output_bias=c.attention_bias,
        rotary_share=_rotary_share(c),
        mlp_bias=c.mlp_bias,
    ),
    "mistral": lambda c: Decoder(windows=_windows(c), rotary_share=_rotary_share(c)),
    "qwen2": lambda c: Decoder(windows=_windows(c), qkv_bias=True, rotary_share=_rotary_share(c)),
    "qwen3": lambda c: Decoder(
        windows=_windows(c),
        qkv_bias=c.attention_bias,
        output_bias=c.attention_bias,
        qk_norm=True,
        rotary_share=_rotary_share(c),
    ),
}


def uniform_window(decoder: Decoder) -> int | None:
    """The sliding window of all layers, checked by `fit.refusals` to be one."""
    (window,) = set(decoder.windows)
    return window


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def common_fields(config: Any) -> dict[str, Any]:
    """Fields that another architecture's config takes over as they are."""
    fields = {name: getattr(config, name) for name in COMMON_FIELDS}
    if fields["hidden_act"] == "swish":
        fields["hidden_act"] = "silu"  # the one spelling that all servers know
    return fields | {"rope_parameters": dict(config.rope_parameters)}


def dense_decoder(config: Any, decoder: Decoder, dense_width: int) -> PreTrainedConfig | None:
    """Config of a plain decoder with this attention; ``None`` where there is none.

    Args:
        config: of a stock model, for the common fields.
        decoder: what its attention does.
        dense_width: of its dense FFNs.
    """
    fields = common_fields(config) | {"intermediate_size": dense_width, "head_dim": head_dim(config)}
    seen = {window for window in decoder.windows if window is not None}
    if decoder.rotary_share != 1.0 or len(seen) > 1:
        return None
    window = seen.pop() if seen else None
    per_layer: dict[str, Any] = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in decoder.windows],
    }
    if decoder.qk_norm:
        if decoder.qkv_bias != decoder.output_bias:
            return None
        return Qwen3Config(**fields, **per_layer, attention_bias=decoder.qkv_bias)
    if decoder.qkv_bias:
        return None if decoder.output_bias else Qwen2Config(**fields, **per_layer)
    if window is None:
        return LlamaConfig(**fields)
    return None if None in decoder.windows else MistralConfig(**fields, sliding_window=window)
