"""Text from a causal language model."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int, temperature: float = 0.0
) -> str:
    """The prompt with up to ``num_tokens`` more tokens, until the end of text; greedy at temperature 0.

    Raises:
        ValueError: the prompt has no tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].numel() == 0:
        raise ValueError(f"prompt={prompt!r} has no tokens; give some text")
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    output = cast(Any, model).generate(
        **inputs, max_new_tokens=num_tokens, pad_token_id=tokenizer.eos_token_id, **options
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
