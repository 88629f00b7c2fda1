"""What a quantisation did, as figures: errors of matrices and layers, tokens of experts, bytes.

Legend: n rows, P output rows, Q reduced columns, E experts, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe.quant.grids import Grid
from moe.quant.inputs import Rows

REPORT_FILE = "quantization_report.json"
ERROR_ROWS = 512  # of each matrix that its error is measured on


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One matrix, or all experts' matrices of one name.

    Attributes:
        name: below ``model.layers.N.``.
        error: |Q(X) What^T - X W^T| / |X W^T| on calibration rows, of all experts together.
        worst_expert: the expert with the largest error of its own, that error being ``worst_error``; ``None`` for one matrix.
    """

    name: str
    error: float
    worst_expert: int | None = None
    worst_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        layer: its index.
        matrices: one each.
        stream_error: relative error of the residual stream after it, from all layers so far: root mean square over the tokens of
            the first windows.
        router_agreement: of the experts that the source's router chooses there, share that the quantised model's chooses;
            ``None`` in a dense layer.
        tokens: what experts were calibrated on: "target", "routed", "reserve", "scored"; empty in a dense layer.
        notes: what was not done, and why.
    """

    layer: int
    matrices: list[MatrixReport]
    stream_error: float
    router_agreement: float | None = None
    tokens: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def never_chosen(self) -> int:
        """Experts that the router sent no calibration token."""
        return sum(not number for number in self.tokens.get("routed", []))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerReport":
        """The inverse of `dataclasses.asdict`."""
        matrices = [MatrixReport(**matrix) for matrix in values["matrices"]]
        return cls(**(dict(values) | {"matrices": matrices}))


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """The whole of it.

    Attributes:
        layers: in order.
        bytes_before, bytes_after: of the weight files.
        calibration_tokens, reserve_tokens: of the text.
        checks: what was found in the finished folder, by name.
    """

    layers: list[LayerReport]
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    reserve_tokens: int
    checks: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for people: a row per layer."""
        rows = [("layer", "attention", "experts", "stream", "router", "tokens of an expert", "never chosen")]
        for layer in self.layers:
            ffn = [matrix for matrix in layer.matrices if matrix.name.startswith("mlp.")]
            others = [matrix for matrix in layer.matrices if not matrix.name.startswith("mlp.")]
            rows.append(
                (
                    str(layer.layer),
                    _worst(others),
                    _worst(ffn),
                    f"{layer.stream_error:.4f}",
                    "" if layer.router_agreement is None else f"{layer.router_agreement:.1%}",
                    _span(layer.tokens),
                    str(layer.never_chosen) if layer.tokens else "",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _worst(matrices: Sequence[MatrixReport]) -> str:
    return f"{max(matrix.error for matrix in matrices):.4f}" if matrices else ""


def _span(tokens: Mapping[str, Any]) -> str:
    """Fewest and most tokens of an expert, before and after balancing."""
    if not tokens:
        return ""
    before = tokens["routed"]
    after = [sum(parts) for parts in zip(before, tokens["reserve"], tokens["scored"], strict=True)]
    text = f"{min(before)}-{max(before)}"
    return text if before == after else f"{text} -> {min(after)}-{max(after)}"


class ErrorMeter:
    """Adds up the errors of the matrices of one name.

    Args:
        activations: grid that rounds what they see, if any.
    """

    def __init__(self, activations: Grid | None) -> None:
        self._activations = activations
        self._lost: list[float] = []
        self._whole: list[float] = []

    @torch.no_grad()
    def add(self, before_PQ: Tensor, after_PQ: Tensor, rows: Rows) -> None:
        """The next matrix, before rounding and dequantised."""
        x_nQ = rows.x_nQ[:ERROR_ROWS]
        seen_nQ = x_nQ if self._activations is None else self._activations.simulate(x_nQ)
        y_nP = x_nQ @ before_PQ.T
        self._lost.append(float((seen_nQ @ after_PQ.T - y_nP).square().sum()))
        self._whole.append(float(y_nP.square().sum()))

    def report(self, name: str) -> MatrixReport:
        """Of all so far."""
        error = _ratio(sum(self._lost), sum(self._whole))
        if len(self._lost) == 1:
            return MatrixReport(name=name, error=error)
        errors = [_ratio(lost, whole) for lost, whole in zip(self._lost, self._whole, strict=True)]
        return MatrixReport(name=name, error=error, worst_expert=errors.index(max(errors)), worst_error=max(errors))


def _ratio(lost: float, square: float) -> float:
    """Relative error; 0 where there is nothing to lose."""
    return (lost / square) ** 0.5 if square else 0.0
