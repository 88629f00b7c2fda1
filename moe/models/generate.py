"""Text from a causal language model."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int, temperature: float = 0.0
) -> str:
    """The prompt with ``num_tokens`` more tokens; greedy at temperature 0."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    output = cast(Any, model).generate(
        **inputs, max_new_tokens=num_tokens, pad_token_id=tokenizer.eos_token_id, **options
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
