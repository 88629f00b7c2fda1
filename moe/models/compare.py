"""How far apart two models are, measured on the logits of a text; holds one model at a time.

The first model's logits go to a temporary file, from which they are read again window by window while the second one runs.

Legend: B windows, L window length, V vocabulary, T = B * L.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """What `compare_logits` found.

    Attributes:
        max_diff: largest absolute difference of two logits; NaN where a logit is NaN.
        reference_rms: root mean square of the reference's logits, which gives ``max_diff`` a scale.
        kl: mean over tokens of KL(reference || other) in nats.
        kl_p99: its 99th percentile over tokens.
        same_top1: share of tokens with the same most likely next token.
        share_far: share of tokens with a logit that is further off than ``far`` times ``reference_rms``.
        reference_loss, other_loss: mean negative log-likelihood in nats of tokens 2 ... L of each window.
        tokens: B * L.
    """

    max_diff: float
    reference_rms: float
    kl: float
    kl_p99: float
    same_top1: float
    share_far: float
    reference_loss: float
    other_loss: float
    tokens: int


def compare_logits(
    reference: Iterable[Tensor], other: Iterable[Tensor], windows_BL: Tensor, far: float = 1e-3
) -> LogitComparison:
    """Compare logits window by window.

    Args:
        reference, other: B tensors (L, V) each, of any floating dtype.
        windows_BL: the token ids that they were computed from.
        far: a difference, relative to the root mean square of the window's reference logits, which counts as far.

    Raises:
        ValueError: the vocabularies differ.
    """
    largest = torch.zeros(())
    square, same, num_far, values = 0.0, 0, 0, 0
    kl_parts: list[Tensor] = []
    losses = [0.0, 0.0]
    for ids_L, expected_LV, got_LV in zip(windows_BL.cpu(), reference, other, strict=True):
        if expected_LV.shape != got_LV.shape:
            raise ValueError(f"logits of {expected_LV.shape[-1]} and of {got_LV.shape[-1]} tokens cannot be compared")
        expected_LV, got_LV = expected_LV.float(), got_LV.float().to(expected_LV.device)
        worst_L = (expected_LV - got_LV).abs().amax(-1)
        largest = torch.maximum(largest, worst_L.max().cpu())  # keeps a NaN
        window_square = expected_LV.square().mean()
        near_L = worst_L <= far * window_square.sqrt()  # False for a NaN
        num_far += int((~near_L).sum())
        logp_LV, logq_LV = expected_LV.log_softmax(-1), got_LV.log_softmax(-1)
        kl_parts.append((logp_LV.exp() * (logp_LV - logq_LV)).sum(-1, dtype=torch.float64).cpu())
        same += int((expected_LV.argmax(-1) == got_LV.argmax(-1)).sum())
        for index, log_LV in enumerate((logp_LV, logq_LV)):
            picked = log_LV[:-1].gather(1, ids_L[1:, None].to(log_LV.device))
            losses[index] -= float(picked.sum(dtype=torch.float64))
        square, values = square + float(window_square), values + 1
    kl_T = torch.cat(kl_parts).numpy()
    tokens, predicted = windows_BL.numel(), max(windows_BL.numel() - len(windows_BL), 1)
    return LogitComparison(
        max_diff=float(largest),
        reference_rms=math.sqrt(square / max(values, 1)),
        kl=float(kl_T.mean()),
        kl_p99=float(np.percentile(kl_T, 99)),
        same_top1=same / tokens,
        share_far=num_far / tokens,
        reference_loss=losses[0] / predicted,
        other_loss=losses[1] / predicted,
        tokens=tokens,
    )


@torch.no_grad()
def model_logits(
    model: nn.Module, windows_BL: Tensor, progress: Callable[[int, int], None] | None = None
) -> Iterator[Tensor]:
    """Logits (L, V) of one window after the other, on the model's device.

    Args:
        model: a transformers causal language model, in eval mode.
        windows_BL: token ids.
        progress: called with windows done and in all.
    """
    device = next(model.parameters()).device
    for index, ids_L in enumerate(windows_BL):
        yield model(input_ids=ids_L[None].to(device), use_cache=False).logits[0]
        if progress is not None:
            progress(index + 1, len(windows_BL))


class LogitsFile:
    """fp32 logits of B windows as plain numbers in a file: iterable, any number of times.

    Args:
        path: of the file.
        num_windows: B.
    """

    def __init__(self, path: Path, num_windows: int) -> None:
        self.path, self.num_windows = path, num_windows

    def write(self, logits: Iterable[Tensor]) -> None:
        """Write all windows, each (L, V)."""
        with self.path.open("wb") as file:
            for logits_LV in logits:
                logits_LV.detach().float().cpu().numpy().tofile(file)

    def windows(self, length: int) -> Iterator[Tensor]:
        """Windows of ``length`` tokens, (L, V) each, one in memory at a time."""
        count = self.path.stat().st_size // 4 // self.num_windows
        assert count % length == 0, f"{self.path} does not hold {self.num_windows} windows of {length} tokens"
        for index in range(self.num_windows):
            values = np.fromfile(self.path, dtype=np.float32, count=count, offset=4 * count * index)
            yield torch.from_numpy(values).view(length, -1)


def load_folder(folder: Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """The causal language model of a folder in eval mode, ours or of transformers.

    Raises:
        ValueError: weights are missing or left over, which transformers only prints.
    """
    from transformers import AutoModelForCausalLM

    import moe.models  # noqa: F401  (registers our architecture)

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = loaded
    problems = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if problems:
        raise ValueError(f"{folder} does not fit its config: " + "; ".join(f"{k}: {v}" for k, v in problems.items()))
    return model.to(device).eval()


def compare_folders(
    reference: Path,
    other: Path,
    windows_BL: Tensor,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    far: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> LogitComparison:
    """Load and run one model after the other, and compare their logits.

    Args:
        reference, other: model folders with the same vocabulary.
        windows_BL: token ids; ``B * L * V * 4`` bytes are needed in the folder of temporary files.
        dtype: in which both compute; fp32 shows differences of the weights alone.
        device: where both run.
        far: as in `compare_logits`.
        progress: called with windows done and in all, of both models together.

    Raises:
        ValueError: a folder does not load whole, or the vocabularies differ.
    """
    num_windows = len(windows_BL)

    def tell(before: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, _: progress(before + done, 2 * num_windows)

    with tempfile.TemporaryDirectory() as scratch:
        stored = LogitsFile(Path(scratch) / "logits", num_windows)
        stored.write(model_logits(load_folder(reference, dtype, device), windows_BL, tell(0)))
        got = model_logits(load_folder(other, dtype, device), windows_BL, tell(num_windows))
        return compare_logits(stored.windows(windows_BL.shape[1]), got, windows_BL, far)
