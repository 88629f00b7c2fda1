"""Tiny models of every kind that stock architectures express, and tiny stock models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models.tiny import DIM, EXPERTS, HIDDEN, VOCAB, decoder_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Dots1Config,
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe.models import MoEConfig, MoEForCausalLM

TOP2 = {"router": {"name": "topk", "top_k": 2}}
SCALED = {"router": {"name": "topk", "top_k": 2, "route_scale": 1.7}}
SWITCH = {"router": {"name": "switch"}}
SUM_OF_TWO = {"router": {"name": "topk", "top_k": 2, "renormalize": False}}
UNIT = {"router": {"name": "topk", "top_k": 1, "frozen": True}}
SIGMOID = {"router": {"name": "noaux_tc", "top_k": 2, "route_scale": 2.5}, "num_shared_experts": 2}
GROUPS = {"router": {"name": "noaux_tc", "num_groups": 2, "top_k_groups": 1}, "num_shared_experts": 1}
PLAIN_SUM = {"router": {"name": "topk", "score": "sigmoid", "top_k": 3, "renormalize": False}}
GATED = {"num_shared_experts": 2, "shared_gate": True}


@dataclass(frozen=True)
class Case:
    """A model of ours and an architecture for it.

    Attributes:
        rewritten: whether weights change on the way, so that they do not come back bit by bit.
    """

    kind: str
    to: str
    moe: dict[str, Any]
    decoder: dict[str, Any] = field(default_factory=dict)
    rewritten: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.to}-{self.moe['router'].get('name')}-{self.decoder}"


CASES = [
    Case("llama", "mixtral", TOP2),
    Case("llama", "mixtral", TOP2, {"tie_word_embeddings": True}),
    Case("llama", "mixtral", TOP2, {"head_dim": 6}),
    Case("llama", "mixtral", {"router": {"name": "gshard"}}),
    Case("llama", "mixtral", {"router": {"name": "noisy_topk", "top_k": 3}}),
    Case("llama", "mixtral", UNIT),
    Case("llama", "mixtral", SCALED, rewritten=True),
    Case("llama", "qwen2_moe", SWITCH | GATED, rewritten=True),
    Case("llama", "glm4_moe", SIGMOID),
    Case("llama", "glm4_moe", SIGMOID | {"first_dense_layers": 1}, {"mlp_bias": False}),
    Case("llama", "glm4_moe", GROUPS, {"tie_word_embeddings": True}),
    Case("llama", "glm4_moe", PLAIN_SUM, rewritten=True),
    Case("llama", "glm4_moe", UNIT, rewritten=True),
    Case("mistral", "mixtral", TOP2, {"sliding_window": 8}),
    Case("mistral", "mixtral", TOP2, {"sliding_window": None}),
    Case("mistral", "glm4_moe", SIGMOID),
    Case("qwen2", "qwen2_moe", TOP2 | GATED),
    Case("qwen2", "qwen2_moe", SUM_OF_TWO | GATED | {"only_layers": [1]}),
    Case("qwen2", "qwen2_moe", TOP2 | {"num_shared_experts": 1}, rewritten=True),
    Case("qwen2", "qwen2_moe", SUM_OF_TWO, {"tie_word_embeddings": True}, rewritten=True),
    Case("qwen2", "glm4_moe", SIGMOID),
    Case("qwen3", "qwen3_moe", TOP2),
    Case("qwen3", "qwen3_moe", SWITCH, {"tie_word_embeddings": True}),
    Case("qwen3", "qwen3_moe", SUM_OF_TWO | {"every": 2}, {"attention_bias": True}),
    Case("qwen3", "qwen3_moe", TOP2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    Case("qwen3", "qwen3_moe", SCALED | {"first_dense_layers": 1}, rewritten=True),
    Case("qwen3", "glm4_moe", SIGMOID),
    Case("qwen3", "dots1", SIGMOID | {"first_dense_layers": 1}),
]


def dense_config(kind: str, **values: Any) -> PreTrainedConfig:
    """A decoder of two layers with room for 128 positions."""
    values = {"max_position_embeddings": 128} | values
    if kind != "qwen2":
        return decoder_config(kind, **values)
    fields = decoder_config("llama").to_dict()
    chosen = {key: fields[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    chosen |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    return Qwen2Config(**(chosen | {"bos_token_id": 1, "eos_token_id": None} | values))


def make_case(case: Case, seed: int = 0) -> MoEForCausalLM:
    """The model, with biases that are not zero and experts of a width of their own."""
    torch.manual_seed(seed)
    moe = {"num_experts": EXPERTS, "expert_hidden": 8} | case.moe
    model = MoEForCausalLM(MoEConfig(text_config=dense_config(case.kind, **case.decoder), moe=moe)).eval()
    return fill_biases(model)


def fill_biases(model: Any) -> Any:
    """Give attention and selection biases values that show, and norms other weights than 1."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias_E", "e_score_correction_bias")):
                tensor.normal_(std=0.2)
            elif name.endswith("bias"):
                tensor.normal_(std=0.5)
            elif name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("gate.weight"):
                tensor.normal_(std=0.3)  # some start at zero
    return model


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_WIDTHS = {"intermediate_size": HIDDEN, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
_SIGMOID = _WIDTHS | {"n_routed_experts": 8, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
_GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
# By name: config class, fields.
STOCK: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"intermediate_size": 8, "num_local_experts": 4, "router_aux_loss_coef": 0.02}),
    "mixtral-window": (MixtralConfig, {"intermediate_size": 8, "num_local_experts": 4, "sliding_window": 8}),
    "mixtral-top1": (MixtralConfig, {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        _WIDTHS | {"num_experts": 5, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (Qwen3MoeConfig, _WIDTHS | {"num_experts": 5, "head_dim": 6, "norm_topk_prob": True}),
    "qwen3_moe-step": (Qwen3MoeConfig, _WIDTHS | {"num_experts": 5, "head_dim": 4, "decoder_sparse_step": 2}),
    "glm4_moe": (Glm4MoeConfig, _SIGMOID | {"head_dim": 8, "attention_bias": True} | _GROUPS),
    "glm4_moe-whole": (
        Glm4MoeConfig,
        _SIGMOID | {"head_dim": 4, "use_qk_norm": True, "partial_rotary_factor": 1.0, "first_k_dense_replace": 0},
    ),
    "olmoe": (OlmoeConfig, {"intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 1.5}),
    "dots1": (Dots1Config, _SIGMOID | {"head_dim": 4, "norm_topk_prob": True, "sliding_window": None} | _GROUPS),
    "deepseek_v3": (DeepseekV3Config, _SIGMOID | _LATENT | {"num_key_value_heads": 4} | _GROUPS),
}


def make_stock(name: str, path: Path, seed: int = 0, **values: Any) -> Any:
    """A stock model, saved by transformers at ``path``."""
    torch.manual_seed(seed)
    config_class, fields = STOCK[name]
    model = fill_biases(AutoModelForCausalLM.from_config(config_class(**(_BASE | fields | values))).eval())
    model.save_pretrained(path)
    return model


@torch.no_grad()
def logits(model: Any, ids_BL: Tensor) -> Tensor:
    """In eval mode."""
    return model.eval()(ids_BL, use_cache=False).logits


@torch.no_grad()
def greedy(model: Any, ids_BL: Tensor, number: int = 64) -> Tensor:
    """Continuation by the most likely tokens, with a cache."""
    return model.generate(ids_BL, max_new_tokens=number, min_new_tokens=number, do_sample=False, pad_token_id=0)
