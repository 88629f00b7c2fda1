"""Tiny models for the GGUF tests, of ours and of transformers, with weights large enough that every part shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe.models import MoEConfig, MoEForCausalLM

VOCAB = 300
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
SIGMOID = {"name": "topk", "top_k": 3, "score": "sigmoid", "selection_bias": True, "route_scale": 3.0}


def ours(decoder: type = LlamaConfig, moe: dict[str, Any] | None = None, **values: Any) -> MoEForCausalLM:
    """A model of ours around a decoder."""
    return MoEForCausalLM(MoEConfig(text_config=decoder(**(DECODER | values)), moe={"num_experts": 4} | (moe or {})))


def mixtral(**values: Any) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**(DECODER | {"num_local_experts": 4} | values)))


def qwen3_moe(**values: Any) -> nn.Module:
    fields = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(DECODER | fields | values)))


def qwen2_moe(**values: Any) -> nn.Module:
    fields = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    fields |= {"shared_expert_intermediate_size": 64}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**(DECODER | fields | values)))


def glm4_moe(**values: Any) -> nn.Module:
    fields: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    fields |= {"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "head_dim": 16}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**(DECODER | fields | values)))


# Name: the architecture of llama.cpp it goes to, and how to make it.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "dense-llama-tied": ("llama", lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True))),
    "dense-llama3-rope": ("llama", lambda: LlamaForCausalLM(LlamaConfig(**DECODER, rope_parameters=LLAMA3_ROPE))),
    "dense-llama-biases": ("llama", lambda: LlamaForCausalLM(LlamaConfig(**DECODER, attention_bias=True))),
    "dense-qwen2": ("llama", lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER))),
    "dense-qwen3": ("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=32))),
    "mixtral": ("llama", mixtral),
    "mixtral-tied-wide-heads": ("llama", lambda: mixtral(tie_word_embeddings=True, head_dim=32)),
    "qwen3-moe": ("qwen3moe", qwen3_moe),
    "qwen3-moe-tied": ("qwen3moe", lambda: qwen3_moe(tie_word_embeddings=True)),
    "qwen2-moe": ("qwen2moe", qwen2_moe),
    "qwen2-moe-tied": ("qwen2moe", lambda: qwen2_moe(tie_word_embeddings=True)),
    "glm4-moe": ("glm4moe", glm4_moe),
    "glm4-moe-biases-norms": ("glm4moe", lambda: glm4_moe(attention_bias=True, first_k_dense_replace=0)),
    "glm4-moe-qk-norm-not-renormalised": ("glm4moe", lambda: glm4_moe(use_qk_norm=True, norm_topk_prob=False)),
    "glm4-moe-groups": ("glm4moe", lambda: glm4_moe(n_group=4, topk_group=2, tie_word_embeddings=True)),
    "ours-topk": ("llama", lambda: ours(rope_parameters=LINEAR_ROPE)),
    "ours-top1-scaled": (
        "llama",
        lambda: ours(moe={"router": {"name": "topk", "top_k": 1, "frozen": True, "route_scale": 0.7}}),
    ),
    "ours-qwen2-renormalised": ("llama", lambda: ours(Qwen2Config)),
    "ours-qwen3-softmax-after": (
        "qwen3moe",
        lambda: ours(Qwen3Config, moe={"router": {"name": "topk", "top_k": 3, "softmax_order": "after"}}, head_dim=16),
    ),
    "ours-sigmoid-carved": (
        "glm4moe",
        lambda: ours(
            moe={"num_experts": 6, "granularity": 4, "num_shared_experts": 2, "only_layers": [1, 2], "router": SIGMOID}
        ),
    ),
    "ours-switch-without-shared": (
        "glm4moe",
        lambda: ours(Qwen3Config, moe={"granularity": 2, "router": {"name": "switch"}}, head_dim=16),
    ),
    "ours-softmax-with-bias": (
        "glm4moe",
        lambda: ours(Qwen2Config, moe={"num_shared_experts": 1, "router": {"name": "topk", "selection_bias": True}}),
    ),
    "ours-gated-shared": (
        "qwen2moe",
        lambda: ours(
            moe={
                "num_shared_experts": 2,
                "shared_gate": True,
                "router": {"name": "topk", "renormalize": False, "route_scale": 2.0},
            }
        ),
    ),
}


def make(name: str) -> Any:
    """The model with norms, biases and selection biases that are not what they start as."""
    torch.manual_seed(0)
    model = MODELS[name][1]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in parameter_name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("bias_E", "e_score_correction_bias")):
            nn.init.normal_(buffer, std=0.1)
    return model.eval()


def save(name: str, folder: Path) -> Any:
    """The model, saved in a folder."""
    model = make(name)
    model.save_pretrained(folder)
    return model
