"""Carving with a short recovery training behind it: carve in our format, train, write in the format asked for.

Legend: B windows, L window length.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import Carved, Describe, LayerReport, carve, carved_config, check_format
from moe.convert.model_card import CARD
from moe.convert.recover import Point, Recovered, RecoverOptions, recover_folder
from moe.models.folder import ModelFolder
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model

# Of a calibration window, so that the graph of one fits where the carving did.
TRAIN_WINDOW = 512
HELD_OUT_SHARE = 5


@dataclass(frozen=True, kw_only=True)
class CarvedAndRecovered:
    """What came out of the two steps."""

    carved: Carved
    recovered: Recovered


def carve_and_recover(
    source: ModelFolder,
    out: Path,
    windows_BL: Tensor,
    options: CarveOptions,
    recover: RecoverOptions,
    *,
    to: str = "moe",
    check_BL: Tensor | None = None,
    report: Callable[[LayerReport], None] = lambda layer: None,
    report_step: Callable[[Point], None] = lambda point: None,
    describe: Describe = lambda carved: {},
) -> CarvedAndRecovered:
    """As `carve`, then `recover_folder` on the calibration text with the dense model as the teacher.

    Args:
        source, out, windows_BL, options, to, check_BL, report, describe: as for `carve`. A fifth of the windows is held out of the
            training, to say what it did.
        recover: how to train.
        report_step: called with each training step.

    Raises:
        ValueError: as `carve`; and if there are fewer than two windows.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    check_format(carved_config(source, options), options, to)
    if len(windows_BL) < 2:
        raise ValueError(
            f"--recover-steps needs at least 2 windows of calibration text, not {len(windows_BL)}; raise --tokens"
        )
    num_held_out = max(len(windows_BL) // HELD_OUT_SHARE, 1)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        raw, trained = Path(scratch, "carved"), Path(scratch, "recovered")
        carved = carve(source, raw, windows_BL, options, check_BL=check_BL, report=report, describe=describe)
        recovered = recover_folder(
            raw,
            trained,
            _cut(windows_BL[num_held_out:]),
            _cut(windows_BL[:num_held_out]),
            recover,
            distill=source.path,
            report=report_step,
        )
        folder = ModelFolder(trained)
        card = {CARD: (trained / CARD).read_text(encoding="utf-8")}
        write_model(replace(reformat(folder), texts=card), out, to)
    return CarvedAndRecovered(carved=replace(carved, out=out), recovered=recovered)


def _cut(windows_BL: Tensor) -> Tensor:
    length = windows_BL.shape[1]
    train = min(TRAIN_WINDOW, length)
    return windows_BL[:, : length // train * train].reshape(-1, train)
