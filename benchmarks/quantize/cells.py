"""Which quantisations the tables compare, and on which text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.carve.cells import IN_DOMAIN, OUT_OF_DOMAIN
from benchmarks.quantize.models import CARVED, UPCYCLED
from moe.quant.options import QuantOptions, parse_method
from moe.quant.schemes import SCHEMES

SEEDS = (0, 1)  # of the choice of calibration text
GROUP = 64  # 128 divides neither 576, the width of the model, nor 192, that of a carved expert
FEW_TOKENS = 0.01  # a starved expert's share of the calibration tokens stays below it
TEXTS = (IN_DOMAIN, OUT_OF_DOMAIN)

METHODS = ("rtn", "smoothquant", "awq", "gptq", "eaquant", "eaquant+gptq")  # as `moe quantize --method`
# After a method's name and a comma: options of ours on top of it.
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "rotated": {"rotate": True},
}
_SIMULATED = (*METHODS, "gptq, rotated", "eaquant+gptq, rotated")
_WEIGHTS_ONLY = ("rtn", "awq", "gptq", "eaquant", "eaquant+gptq")
# Methods that have something to do for a scheme: smoothing moves outliers of activations, which some schemes leave as they are.
QUALITY: dict[str, tuple[str, ...]] = {
    "w8a16": ("rtn", "gptq"),
    "w4a16": (*_WEIGHTS_ONLY, "awq+gptq"),
    "w3a16": _WEIGHTS_ONLY,
    "w8a8": ("rtn", "smoothquant", "gptq", "eaquant"),
    "w4a8": METHODS,
    "w4a4": _SIMULATED,
    "w3a4": _SIMULATED,
    "fp8": ("rtn", "smoothquant", "eaquant"),
    "mxfp4": _WEIGHTS_ONLY,
}
QUALITY_UPCYCLED: dict[str, tuple[str, ...]] = {
    "w8a8": ("rtn", "eaquant"),
    "w4a16": ("rtn", "gptq", "eaquant+gptq"),
    "w4a4": _SIMULATED,
    "w3a4": _SIMULATED,
}
ABLATED = ("w4a4", "w3a4")
PARTS = ("smoothing", "router", "balance")
_PART: dict[str, dict[str, Any]] = {
    "smoothing": {"scaling": "eaquant"},
    "router": {"align_router": True},
    "balance": {"balance": 2.0},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much text.

    Attributes:
        window: tokens in a window.
        tokens: of calibration.
        reserve: further tokens, from which balanced calibration takes what experts lack.
        windows: evaluated, of each of `TEXTS`.
    """

    window: int = 512
    tokens: int = 4096
    reserve: int = 4096
    windows: tuple[int, int] = (10, 4)


FULL = Size()
QUICK = Size(window=32, tokens=256, reserve=256, windows=(2, 2))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table.

    Attributes:
        part: of the benchmark.
        model: "carved" or "upcycled".
        method: its name in the table.
        options: what the quantiser is told.
        parts: of EAQuant that are on, in an ablation.
        starved: calibrate while the routers of the model are skewed.
    """

    part: str
    model: str
    method: str
    options: QuantOptions
    parts: tuple[str, ...] = field(default=())
    starved: bool = False

    @property
    def key(self) -> str:
        """Says which cell it is."""
        words = (self.part, self.model, self.options.scheme, self.method, *self.parts, f"seed {self.options.seed}")
        return " | ".join((*words, "starved") if self.starved else words)


def method_options(scheme: str, method: str, seed: int) -> QuantOptions:
    """What ``moe quantize --scheme SCHEME --method METHOD`` does, with one of `EXTRAS` after a comma."""
    name, _, extra = method.partition(", ")
    return options_of(scheme, asdict(parse_method(name, scheme)) | EXTRAS[extra], seed)


def options_of(scheme: str, settings: dict[str, Any], seed: int) -> QuantOptions:
    """Of a scheme, in groups that divide the models' widths, and a method's settings."""
    has_groups = GROUP in SCHEMES[scheme].group_sizes and SCHEMES[scheme].weights.group_size is not None
    return QuantOptions(scheme=scheme, group_size=GROUP if has_groups else None, seed=seed, **settings)


def quality_cells(quick: bool) -> list[Cell]:
    """Every scheme by every method that suits it; seeds decide the calibration text, which ``rtn`` does not see."""
    tables = {CARVED: QUALITY, UPCYCLED: QUALITY_UPCYCLED}
    if quick:
        tables = {CARVED: {"w8a8": ("rtn",), "w4a4": _SIMULATED}, UPCYCLED: {"w4a16": ("gptq",)}}
    found = []
    for model, table in tables.items():
        for scheme, methods in table.items():
            for method in methods:
                for seed in SEEDS[:1] if method == "rtn" or quick else SEEDS:
                    options = method_options(scheme, method, seed)
                    found.append(Cell(part="quality", model=model, method=method, options=options))
    return found


def ablation_cells(quick: bool) -> list[Cell]:
    """EAQuant's three parts, each on and off, under GPTQ, and for the carved model also under rounding to nearest.

    Rounding to nearest sees no calibration, so that balance has something to act on only where there is smoothing or GPTQ.
    """
    found = []
    for model, rounding in ((CARVED, "rtn"), (CARVED, "gptq"), (UPCYCLED, "gptq")):
        if quick and (model, rounding) != (CARVED, "gptq"):
            continue
        for scheme in ABLATED[: 1 if quick else 2]:
            for parts in _subsets(PARTS):
                if rounding == "rtn" and "balance" in parts and "smoothing" not in parts:
                    continue
                settings = {key: value for part in parts for key, value in _PART[part].items()}
                options = options_of(scheme, settings | {"rounding": rounding}, 0)
                found.append(Cell(part="ablation", model=model, method=rounding, options=options, parts=parts))
    return found


def _subsets(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for mask in range(1 << len(parts)):
        yield tuple(part for index, part in enumerate(parts) if mask >> index & 1)


def starved_cells(quick: bool) -> list[Cell]:
    """Calibrated on ordinary routing and on skewed routing, with and without balance; evaluated on ordinary routing."""
    found = []
    for scheme in ("w4a16", "w4a4")[: 1 if quick else 2]:
        for method in ("gptq", "eaquant+gptq"):
            options = method_options(scheme, method, 0)
            for balance in (0.0, 2.0):
                told = replace(options, balance=balance)
                for starved in (False, True):
                    label = f"{method}, {'balanced' if balance else 'as routed'}"
                    found.append(Cell(part="starved", model=CARVED, method=label, options=told, starved=starved))
    return found


CELLS = {"quality": quality_cells, "ablation": ablation_cells, "starved": starved_cells}
