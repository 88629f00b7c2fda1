"""Tiny models around real decoders, with weights large enough that every part shows."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from moe.layer import MoELayer, moe_layers
from moe.models import MoEConfig, MoEForCausalLM

DECODERS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig}
VOCAB, DIM, HIDDEN, EXPERTS = 48, 16, 12, 4
NO_BALANCE = {"aux_coef": 0.0}


def decoder_config(kind: str = "llama", **values: Any) -> PreTrainedConfig:
    """A decoder of two layers with grouped-query attention."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return DECODERS[kind](**(fields | values))


def make_model(
    kind: str = "llama", *, seed: int = 0, decoder: dict[str, Any] | None = None, **moe: Any
) -> MoEForCausalLM:
    """A model from scratch in training mode; ``moe`` are fields of `MoESpec`."""
    torch.manual_seed(seed)
    config = MoEConfig(text_config=decoder_config(kind, **(decoder or {})), moe={"num_experts": EXPERTS} | moe)
    return MoEForCausalLM(config).train()


def same_weights(model: MoEForCausalLM, **moe: Any) -> MoEForCausalLM:
    """A model with the weights of ``model`` and other fields in its spec."""
    config = MoEConfig(text_config=model.config.text_config, moe=model.config.moe | moe)
    other = MoEForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids that are no special ones."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model: torch.nn.Module) -> list[MoELayer]:
    return list(moe_layers(model).values())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by name; a parameter without one is an error."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-4) -> None:
    """Each tensor's worst error is below ``limit`` times the RMS of what is expected."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        worst, scale = (got[name] - value).abs().max().item(), value.square().mean().sqrt().item()
        assert worst <= limit * scale, f"{name}: worst error {worst:.2e}, RMS of expected {scale:.2e}"
