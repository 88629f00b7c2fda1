"""Carves a model in memory and takes perplexities: real MoE layers with the weights that `moe carve` would write.

The dense model passes the calibration text once for all cells that see the same text. Carvings of all of them are kept until
they are evaluated; no folder is written.

Legend: B windows, L window length, T = B * L, D model.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.carve.cells import Cell, Size
from benchmarks.spec import Row
from moe.convert.carve.build import build_layer, moe_spec
from moe.convert.carve.calibrate import CalibrationWalk
from moe.convert.carve.gates import carved_output
from moe.convert.carve.layer import carve_layer
from moe.convert.carve.measure import LayerQuality, measure
from moe.convert.carve.neurons import output
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import in_fp32
from moe.convert.carve.types import Carving, LayerInputs
from moe.convert.dense import DenseFFN, activation, read_ffn
from moe.layer import MoELayer, MoESpec
from moe.models.compare import load_folder
from moe.models.evaluate import perplexity
from moe.models.folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Windows (B, L) of token ids.

    Attributes:
        calibration_BL: by calibration and seed.
        in_BL, out_BL: to evaluate on.
    """

    calibration_BL: Callable[[str, int], Tensor]
    in_BL: Tensor
    out_BL: Tensor


@dataclass(kw_only=True)
class CarvedModel:
    """MoE layers of one cell, and the seconds that making them took, where they were made for it alone."""

    layers: list[MoELayer] = field(default_factory=list)
    quality: list[LayerQuality] = field(default_factory=list)
    seconds: float | None = None


def carve_together(
    source: ModelFolder, windows_BL: Tensor, cells: list[Cell], report: Callable[[str], None]
) -> list[CarvedModel]:
    """Carve cells that see the same text in one pass of the dense model over it; one cell alone may be sequential."""
    sequential = any(cell.options.sequential for cell in cells)
    assert len(cells) == 1 or not sequential
    walk, made = CalibrationWalk(source, windows_BL), [CarvedModel() for _ in cells]
    act = activation(source.config)
    for layer in range(walk.num_layers):
        ffn = in_fp32(read_ffn(source, layer))
        inputs = walk.enter(partial(output, ffn))
        carvings: dict[CarveOptions, Carving] = {}
        for index in sorted(range(len(cells)), key=lambda index: not cells[index].options.refit):
            options = cells[index].options
            carvings[options] = _carve(ffn, inputs, options, layer, carvings, made[index])
            _add_layer(made[index], ffn, inputs, options, carvings[options], act)
        top_k = cells[0].options.shape.top_k
        walk.leave(partial(carved_output, ffn, carvings[cells[0].options], top_k=top_k) if sequential else None)
        report(f"  carved layer {layer + 1} of {walk.num_layers} for {len(cells)} cells")
    return made


def _carve(
    ffn: DenseFFN,
    inputs: LayerInputs,
    options: CarveOptions,
    layer: int,
    before: dict[CarveOptions, Carving],
    made: CarvedModel,
) -> Carving:
    """The layer's carving; what was carved with a refit is not carved again without it, and then has no time of its own."""
    refitted = dataclasses.replace(options, refit=True)
    if refitted in before:
        made.seconds = None
        return dataclasses.replace(before[refitted], down_DF=None)
    start = time.perf_counter()
    carving = carve_layer(ffn, inputs, options, layer)
    made.seconds = (made.seconds or 0.0) + time.perf_counter() - start
    return carving


def _add_layer(
    made: CarvedModel, ffn: DenseFFN, inputs: LayerInputs, options: CarveOptions, carving: Carving, act: str
) -> None:
    top_k = options.shape.top_k
    made.quality.append(measure(ffn, inputs, carving, top_k))
    spec = MoESpec.from_dict(moe_spec(options.shape, options.shape.check(ffn.width), act, type(carving.gate)))
    layer = MoELayer(inputs.x_TD.shape[1], spec, ffn.width)
    weights = build_layer(ffn, carving, top_k, inputs.x_TD, ffn.up_FD.dtype)
    layer.load_state_dict(dict(weights.named("")))
    made.layers.append(layer.eval())


class Evaluation:
    """The dense model, into which carved layers are put.

    Args:
        folder: the dense model.
        texts: what perplexities are taken on.
    """

    def __init__(self, folder: Path, texts: Texts) -> None:
        self._model: Any = load_folder(folder)
        self._dense = [layer.mlp for layer in self._model.model.layers]
        self._texts = texts
        self.dense = self._perplexities()

    def _perplexities(self) -> tuple[float, float]:
        found = [
            perplexity(self._model, windows, batch_size=1)["perplexity"]
            for windows in (self._texts.in_BL, self._texts.out_BL)
        ]
        return found[0], found[1]

    def __call__(self, layers: list[MoELayer]) -> tuple[float, float]:
        """Perplexities on text like the calibration's and on other text."""
        self._put(layers)
        try:
            return self._perplexities()
        finally:
            self._put(self._dense)

    def _put(self, ffns: list[Any]) -> None:
        for layer, ffn in zip(self._model.model.layers, ffns, strict=True):
            assert isinstance(ffn, nn.Module)
            layer.mlp = ffn


def row_of(
    cell: Cell,
    made: CarvedModel,
    found: tuple[float, float],
    dense: tuple[float, float],
    num_tokens: int,
    ffn_millions: float,
) -> Row:
    """A finished cell."""
    return {
        "part": "quality",
        "setting": cell.setting,
        "active": f"{cell.options.shape.active_share:.0%}",
        "method": cell.label,
        "calibration": cell.calibration,
        "tokens": num_tokens,
        "seed": cell.options.seed,
        "ppl_in": round(found[0], 3),
        "ppl_out": round(found[1], 3),
        "ppl_in_of_dense": round(found[0] / dense[0], 3),
        "ppl_out_of_dense": round(found[1] / dense[1], 3),
        "energy_kept": round(statistics.fmean(q.energy_kept for q in made.quality), 4),
        "recall": round(statistics.fmean(q.recall for q in made.quality), 4),
        "seconds": None if made.seconds is None else round(made.seconds, 1),
        "s_per_mparam": None if made.seconds is None else round(made.seconds / ffn_millions, 4),
    }


def released_windows(windows_BL: Tensor, size: Size) -> Tensor:
    """The part of the calibration text that CMoE's released code uses."""
    return windows_BL[: size.released_tokens // size.window]


def ffn_parameters(source: ModelFolder) -> float:
    """Millions of parameters in all FFNs."""
    ffn = read_ffn(source, 0)
    count = sum(getattr(ffn, f.name).numel() for f in dataclasses.fields(ffn) if getattr(ffn, f.name) is not None)
    return count * source.config.num_hidden_layers / 1e6
