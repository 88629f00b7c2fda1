"""Calibration text: files cut into windows of tokens, and a seeded choice of them.

Legend: B windows, L window length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moe.models.evaluate import cut_windows

# Share of a file that calibrates where the same file also evaluates; the rest evaluates.
CALIBRATION_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class CalibrationWindows:
    """Token ids in windows, (B, L) int64 each.

    Attributes:
        calibration_BL: what experts are made from.
        evaluation_BL: text that was not used for it, or ``None``.
        reserve_BL: more calibration text, or ``None``.
    """

    calibration_BL: Tensor
    evaluation_BL: Tensor | None
    reserve_BL: Tensor | None = None


def read_windows(
    model: Path,
    files: Sequence[Path],
    num_tokens: int,
    window: int,
    evaluate: Path | None = None,
    eval_windows: int | None = None,
    seed: int = 0,
    reserve_tokens: int = 0,
) -> CalibrationWindows:
    """Calibration and evaluation windows from text files.

    Args:
        model: folder whose tokenizer is used.
        files: calibration text, from which windows are chosen at random.
        num_tokens: of calibration in all.
        window: L.
        evaluate: a file to evaluate on; a calibration file of the same name is split in two.
        eval_windows: of it, from the start.
        seed: of the choice.
        reserve_tokens: wanted beyond those, as far as the files have them.

    Raises:
        ValueError: no tokenizer, a file is missing, or a text is too short.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{model} has no tokenizer that can be read: {problem}") from None
    texts, held_out = [], None
    for file in files:
        text = read_text(file)
        if evaluate is not None and file.resolve() == evaluate.resolve():
            text, held_out = split_text(text)
        texts.append(tokenize(tokenizer, text))
    chosen = choose_text(texts, num_tokens, window, torch.Generator().manual_seed(seed), reserve_tokens)
    if evaluate is None:
        return chosen
    ids = tokenize(tokenizer, read_text(evaluate) if held_out is None else held_out)
    return replace(chosen, evaluation_BL=cut_windows(ids, window, eval_windows))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: it is no file.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a text file")
    return path.read_text(encoding="utf-8", errors="replace")


def split_text(text: str) -> tuple[str, str]:
    """The part that calibrates and the part that evaluates, cut at a line."""
    cut = text.find("\n", int(len(text) * CALIBRATION_SHARE)) + 1
    return (text[:cut], text[cut:]) if cut else (text, "")


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a whole text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def choose_windows(texts_ids: Sequence[list[int]], num_tokens: int, window: int, generator: torch.Generator) -> Tensor:
    """The calibration windows of `choose_text`, (B, L) int64."""
    return choose_text(texts_ids, num_tokens, window, generator).calibration_BL


def choose_text(
    texts_ids: Sequence[list[int]], num_tokens: int, window: int, generator: torch.Generator, reserve_tokens: int = 0
) -> CalibrationWindows:
    """Calibration windows, B * L = ``num_tokens``, as many of each text as of the others, or one more; and a reserve.

    Args:
        texts_ids: token ids of each text.
        num_tokens: wanted in all.
        window: L.
        generator: chooses among the windows of a text.
        reserve_tokens: wanted beyond those, in the same shares, as far as there are some; the calibration windows are the same
            with and without.

    Raises:
        ValueError: the number of tokens is no multiple of the window, or a text is too short for its part.
    """
    num_windows, rest = divmod(num_tokens, window)
    if rest or num_windows < len(texts_ids):
        least = len(texts_ids) * window
        raise ValueError(
            f"--tokens {num_tokens} must be a multiple of --window {window}, at least {least} for {len(texts_ids)} "
            f"text{'s' if len(texts_ids) > 1 else ''}; use {max(num_windows * window, least)}"
        )
    chosen, reserve = [], []
    reserve_share = -(-reserve_tokens // (window * len(texts_ids)))
    for index, ids in enumerate(texts_ids):
        share = num_windows // len(texts_ids) + (index < num_windows % len(texts_ids))
        if len(ids) < share * window:
            most = len(ids) // window * window * len(texts_ids)
            fix = f"--tokens {most} at most" if most else f"--window {len(ids)} at most"
            raise ValueError(
                f"calibration text {index + 1} has {len(ids)} tokens, and {share * window} of it are wanted; give more "
                f"text or {fix}"
            )
        windows_BL = cut_windows(ids, window, None)
        order_B = torch.randperm(len(windows_BL), generator=generator)
        chosen.append(windows_BL[order_B[:share].sort().values])
        reserve.append(windows_BL[order_B[share : share + reserve_share].sort().values])
    reserve_BL = torch.cat(reserve)
    return CalibrationWindows(
        calibration_BL=torch.cat(chosen),
        evaluation_BL=None,
        reserve_BL=reserve_BL if len(reserve_BL) else None,
    )
