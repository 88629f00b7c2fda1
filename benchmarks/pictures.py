"""Pictures of benchmarks: drawn with the style of the training report, saved beside the CSVs as ``results/NAME.png``.

`figure` makes a page of panels on a light background and `style` one panel; matplotlib is imported only when one is drawn,
so that benchmarks without pictures run without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure of the report's width, ``height`` inches high, and its panels in reading order."""
    from moe.train.picture_style import new_figure

    return new_figure(height, rows, columns)


def style(axes: "Axes", title: str, xlabel: str, ylabel: str = "") -> None:
    """Title, labels, grid and colours of one panel; scales and ticks stay as they are."""
    from moe.train.picture_style import LIGHT, style_panel

    style_panel(axes, LIGHT, title, xlabel, ylabel)


def save(figure: "Figure", name: str) -> Path:
    """Write ``results/NAME.png`` over what was there."""
    from moe.train.picture_style import LIGHT

    path = RESULTS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor=LIGHT.page)
    return path
