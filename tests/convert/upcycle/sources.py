"""Tiny dense models as folders, whose weights are all large enough to show."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moe.models  # noqa: F401  (registers our architecture)
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import Upcycled, upcycle

VOCAB, DIM, WIDTH, LAYERS = 96, 32, 48, 3
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_dense(kind: str = "llama", seed: int = 0, **values: Any) -> Any:
    """A model of transformers in eval mode; biases and norms are not at their initial values either."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(FIELDS | values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def save_dense(
    folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype | None = None, **values: Any
) -> Path:
    """`make_dense` as a folder, without a tokenizer."""
    model = make_dense(kind, seed, **values)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def convert(source: Path, out: Path, **options: Any) -> Upcycled:
    """Upcycle to four experts, two per token, and verify."""
    return upcycle([source], out, UpcycleOptions(**({"num_experts": 4, "top_k": 2} | options)))


def load(folder: Path) -> Any:
    """The model of a folder in fp32 and eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@torch.no_grad()
def greedy(model: Any, ids: Tensor, num_tokens: int = 64) -> list[int]:
    """Tokens that follow, with the key-value cache."""
    found = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return found[0, ids.shape[1] :].tolist()
