"""Perplexity of a causal language model on a text.

Legend: B batch, L window length.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def cut_windows(token_ids: list[int], window: int, max_windows: int | None) -> Tensor:
    """(num_windows, L) int64, consecutive windows without overlap; a shorter rest is left out.

    Raises:
        ValueError: the text is shorter than one window.
    """
    num_windows = len(token_ids) // window
    if num_windows == 0:
        raise ValueError(f"the text has {len(token_ids)} tokens, less than one window of {window}; lower --window")
    num_windows = min(num_windows, max_windows or num_windows)
    return torch.tensor(token_ids[: num_windows * window]).view(num_windows, window)


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats per token, kept below the largest float."""
    return math.exp(min(loss, 700))


@torch.no_grad()
def perplexity(
    model: nn.Module, windows_BL: Tensor, progress: Callable[[int, int], None] | None = None, batch_size: int = 4
) -> dict[str, Any]:
    """Mean negative log-likelihood of tokens 2 ... L of each window.

    Args:
        model: a transformers causal language model, in eval mode.
        windows_BL: token ids.
        progress: called with windows done and in all.
        batch_size: windows at a time.

    Returns:
        "loss" in nats per token, "perplexity", "tokens" counted, "windows".
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(windows_BL), batch_size):
        chunk = windows_BL[start : start + batch_size].to(device)
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total, count = total + losses.item(), count + chunk[:, 1:].numel()
        if progress is not None:
            progress(min(start + batch_size, len(windows_BL)), len(windows_BL))
    loss = total / count
    return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": count, "windows": len(windows_BL)}
