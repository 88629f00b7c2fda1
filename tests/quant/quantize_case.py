"""Tiny models and text for tests of the engine."""

from pathlib import Path
from typing import Any

import torch
from models.stock.stock_cases import make_stock
from models.tiny import tokens

from moe.models.folder import ModelFolder
from moe.quant.options import QuantOptions
from moe.quant.plan import Plan, make_plan
from moe.quant.run import CalibrationText

WINDOWS, RESERVE = tokens(6, 16), tokens(5, 16, seed=7)
TEXT = CalibrationText(windows_BL=WINDOWS, reserve_BL=RESERVE)


def stock_folder(folder: Path, name: str = "glm4_moe", dtype: torch.dtype | None = None) -> ModelFolder:
    """A stock model; widths of 8 and 16, so groups are whole rows."""
    model = make_stock(name, folder)
    if dtype is not None:
        model.to(dtype).save_pretrained(folder)
    return ModelFolder(folder)


def plan_of(source: ModelFolder, scheme: str = "w4a16", **options: Any) -> Plan:
    places = {key: options.pop(key) for key in ("to", "container") if key in options}
    groups = {"group_size": 0} if scheme not in ("w8a8", "fp8", "mxfp4") else {}
    return make_plan(source, QuantOptions(scheme=scheme, **(groups | options)), **places)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
