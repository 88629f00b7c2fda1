"""Recovery training from folder to folder: our format in, our format out, in the dtypes that the folder has."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.convert.model_card import CARD
from moe.convert.recover.options import RecoverOptions
from moe.convert.recover.training import Point, Recovery
from moe.models.compare import load_folder
from moe.models.config import MoEConfig
from moe.models.folder import FolderWriter, ModelFolder
from moe.models.stock.ours import OURS


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """How it went.

    Attributes:
        before, after: perplexity on the held-out text.
        tokens: trained on.
        points: all steps.
    """

    before: float
    after: float
    tokens: int
    points: list[Point]


def recover_folder(
    source: Path,
    out: Path,
    windows_BL: Tensor,
    held_out_BL: Tensor,
    options: RecoverOptions,
    *,
    distill: Path | None = None,
    device: str = "cpu",
    report: Callable[[Point], None] = lambda point: None,
    command: str | None = None,
) -> Recovered:
    """Train the model of a folder and write it to another.

    Args:
        source: a folder that carving, upcycling, `moe import` or a training run made.
        out: the folder to make; it appears when it is complete.
        windows_BL, held_out_BL: int64 token ids to train and to evaluate on.
        options: how.
        distill: folder of the teacher, such as the dense model it was made from.
        device: to train on; weights, gradients and optimizer states have to fit.
        report: called with each step.
        command: for the model card.

    Raises:
        ValueError: ``out`` exists, the source is not in our format, a folder does not load whole, or a loss is not finite.
    """
    folder = ModelFolder(source)
    if Path(out).exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    config = folder.config
    if not isinstance(config, MoEConfig):
        raise ValueError(
            f"{source} has model_type={config.model_type!r}; recovery trains models in our own format: `moe import` it first"
        )
    model = load_folder(folder.path, torch.float32, device)
    teacher = None if distill is None else load_folder(ModelFolder(distill).path, torch.float32, device)
    recovery = Recovery(model, windows_BL, held_out_BL, options, teacher)
    points = recovery.run(report)
    before, after = (math.exp(min(point.held_out or 0.0, 700)) for point in (points[0], points[-1]))
    result = Recovered(before=before, after=after, tokens=points[-1].tokens, points=points)
    state = recovery.model.state_dict()
    with FolderWriter(Path(out)) as writer:
        for name in folder.names:
            writer.add(name, state[name].to("cpu", folder.read(name).dtype))
        card = source / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {Path(out).name}\n"
        writer.finish(OURS.to_stock(config), folder.sidecars(), {CARD: text + card_section(options, result, command)})
    return result


def card_section(options: RecoverOptions, result: Recovered, command: str | None) -> str:
    """What the model card says of the training."""
    how = f"{options.mode}, {options.steps} steps, {result.tokens} tokens, peak learning rate {options.peak_lr:g}"
    lines = [
        "\n## Recovery training\n",
        f"{how[0].upper()}{how[1:]}. Perplexity on held-out text of the same file: {result.before:.3f} before, "
        f"{result.after:.3f} after.",
    ]
    if command is not None:
        lines.append(f"\n```\n{command}\n```")
    return "\n".join(lines) + "\n"
