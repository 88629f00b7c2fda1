"""Which carvings the table compares, and the texts they see."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT
from moe.convert.carve import CARVERS
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.types import CarveShape

# Folder with wikitext2/valid.txt and shakespeare.txt; the first 80 % of a file calibrates and the rest evaluates.
TEXT = Path(os.environ.get("CARVE_TEXT", ROOT.parent / "shared" / "data"))
IN_DOMAIN, OUT_OF_DOMAIN = "wikitext2/valid.txt", "shakespeare.txt"
CALIBRATIONS = {"in-domain": (IN_DOMAIN,), "mixed": (IN_DOMAIN, OUT_OF_DOMAIN)}
SHAPES = (
    CarveShape(num_experts=8, num_shared=2, top_k=4),
    CarveShape(num_experts=8, num_shared=2, top_k=2),
    CarveShape(num_experts=16, num_shared=4, top_k=8),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much text.

    Attributes:
        window: tokens in a window.
        tokens: of calibration text.
        released_tokens: of it, for CMoE as released.
        windows_in, windows_out: evaluated, of text like the calibration's and of other text.
    """

    window: int = 2048
    tokens: int = 32768
    released_tokens: int = 16384
    windows_in: int = 8
    windows_out: int = 4


FULL = Size()
QUICK = Size(window=32, tokens=256, released_tokens=128, windows_in=2, windows_out=2)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table.

    Attributes:
        label: the method's name there.
        options: what it is told.
        calibration: a key of `CALIBRATIONS`.
        released: with the tokens of CMoE's released code, layer after carved layer.
    """

    label: str
    options: CarveOptions
    calibration: str = "in-domain"
    released: bool = False

    @property
    def key(self) -> str:
        """Says which cell it is."""
        return f"{self.setting} | {self.label} | {self.calibration} | seed {self.options.seed}"

    @property
    def setting(self) -> str:
        """The shape in words."""
        shape = self.options.shape
        return f"{shape.num_experts} experts: {shape.num_shared} shared + {shape.top_k} of {shape.num_routed}"


# Label, method, gate, refit.
_METHODS = (
    ("cmoe + refit", "cmoe", "own", True),
    ("cmoe, ridge gate + refit", "cmoe", "ridge", True),
    ("weaver", "weaver", "own", False),
    ("weaver + refit", "weaver", "own", True),
    ("llama-moe", "llama-moe", "own", False),
    ("llama-moe, ridge gate + refit", "llama-moe", "ridge", True),
    ("best", "best", "own", False),
    ("best + refit", "best", "own", True),
    ("static", "static", "own", False),
    ("static + refit", "static", "own", True),
)
_REPEATED = ("best + refit", "static + refit")  # with a second seed and with mixed text, for the first two shapes


def cells(quick: bool) -> list[Cell]:
    """All cells, those that share a calibration together."""

    def of_shape(shape: CarveShape, seed: int, labels: tuple[str, ...] | None) -> list[CarveOptions]:
        return [
            CarveOptions(shape=shape, method=method, gate=gate, refit=refit, seed=seed)  # type: ignore[arg-type]
            for label, method, gate, refit in _METHODS
            if method in CARVERS and (labels is None or label in labels)
        ]

    names = {(method, gate, refit): label for label, method, gate, refit in _METHODS}

    def named(options: CarveOptions, calibration: str) -> Cell:
        label = names[options.method, options.gate, options.refit]
        return Cell(label=label, options=options, calibration=calibration)

    shapes = SHAPES[:1] if quick else SHAPES
    found = [named(options, "in-domain") for shape in shapes for options in of_shape(shape, 0, None)]
    for shape in shapes[:2]:
        found += [named(options, "mixed") for options in of_shape(shape, 0, _REPEATED)]
        found += [named(options, "in-domain") for options in of_shape(shape, 1, _REPEATED)]
    for shape in shapes:
        for seed in (0, 1) if shape in shapes[:2] else (0,):
            options = CarveOptions(shape=shape, method="cmoe", refit=False, sequential=True, seed=seed)
            found.append(Cell(label="cmoe, as released", options=options, released=True))
    return found
