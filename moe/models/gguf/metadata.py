"""Hyperparameters as llama.cpp's keys ``ARCHITECTURE.key``."""

from typing import Any

from moe.models.gguf.architectures import Architecture
from moe.models.gguf.source import GGUFSource
from moe.models.stock.fit import dense_layers, gate_of

GATING_FUNCTIONS = {"softmax": 1, "sigmoid": 2}


def hyperparameters(source: GGUFSource, architecture: Architecture) -> dict[str, int | float | bool | str]:
    """All keys of the model but those of the tokenizer, without the architecture's prefix.

    Whole numbers are unsigned 32-bit, others 32-bit floats.
    """
    decoder = source.decoder
    values: dict[str, int | float | bool | str] = {
        "block_count": decoder.num_hidden_layers,
        "context_length": decoder.max_position_embeddings,
        "embedding_length": decoder.hidden_size,
        "feed_forward_length": decoder.intermediate_size,
        "vocab_size": decoder.vocab_size,
        "attention.head_count": decoder.num_attention_heads,
        "attention.head_count_kv": source.num_kv_heads,
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "attention.layer_norm_rms_epsilon": float(decoder.rms_norm_eps),
        "rope.dimension_count": source.head_dim,
        "rope.freq_base": float(decoder.rope_parameters["rope_theta"]),
    }
    if source.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(decoder.rope_parameters["factor"])}
    if source.config is not None:
        values |= _experts(source, architecture)
    return values


def _experts(source: GGUFSource, architecture: Architecture) -> dict[str, Any]:
    assert source.config is not None
    spec, gate = source.config.spec, gate_of(source.config.spec)
    assert gate is not None, "checked by `choose_architecture`"
    hidden = spec.hidden(source.decoder.intermediate_size)
    values: dict[str, Any] = {
        "expert_count": spec.num_experts,
        "expert_used_count": gate.rule.top_k,
        architecture.expert_width_key: hidden,
    }
    if spec.shared_gate:
        values["expert_shared_feed_forward_length"] = spec.num_shared_experts * hidden
    if architecture.generic_gate:
        values |= {
            "expert_shared_count": max(spec.num_shared_experts, 1),
            "leading_dense_block_count": len(dense_layers(source.config)),
            "expert_gating_func": GATING_FUNCTIONS[gate.rule.score],
            "expert_weights_norm": gate.rule.renormalize,
            "expert_weights_scale": float(gate.rule.route_scale),
        }
        if gate.rule.num_groups > 1:
            values |= {"expert_group_count": gate.rule.num_groups, "expert_group_used_count": gate.rule.top_k_groups}
    return values
