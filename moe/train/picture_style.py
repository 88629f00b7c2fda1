"""What the pictures of a run share: colours for light and dark pages, thinning to a bounded size, axes, rendering.

Drawn with matplotlib's Agg canvas through `Figure`, without pyplot: no global state, no display, safe inside a
training process. No curve holds more than `MAX_COLUMNS` points, so a run of 100k steps costs what one of 800 does.

Shapes: n records, C points of a curve.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from moe.train.formats import compact
from moe.train.metrics import Record

MAX_COLUMNS = 800
DPI = 160
WIDTH = 10.0  # inches, of a picture across the page
HALF_WIDTH = 6.0
MIN_TO_SMOOTH = 50  # points below which a moving average hides more than it shows
ROUND = [1, 2, 2.5, 5, 10]  # what the eye expects between ticks; matplotlib would also take 1.5, 3, 4, 6, 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture."""

    page: str
    text: str
    muted: str
    grid: str
    accent: str
    second: str
    load: tuple[str, ...]
    layers: tuple[float, float]  # the part of viridis that stands out from the page


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#5b6470", "#e6e8eb", "#2557d6", "#d9480f",
    ("#08306b", "#2b7bba", "#a9cfe5", "#f6f5f1", "#fdbe85", "#e6550d", "#7f2704"), (0.0, 0.85),
)  # fmt: skip
DARK = Theme(
    "#161a20", "#e8eaed", "#9aa4b1", "#2b313a", "#7aa2ff", "#ff9d5c",
    ("#b5dcff", "#4f9fe0", "#2a567f", "#20252d", "#7d4a26", "#e8833a", "#ffd9ae"), (0.25, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture: PNG bytes for light and dark pages, a text for those who cannot see it, and its size in pixels."""

    name: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    width: int
    height: int


def column(records: Sequence[Record], key: str) -> Floats:
    """One field of all the records, (n,), NaN where it is missing or null."""
    values = (record.get(key) for record in records)
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


@dataclass(frozen=True)
class Curve:
    """At most MAX_COLUMNS points: the mean, least and greatest value over neighbouring steps; (C,) each."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    last: float = math.nan  # of the series itself, not a mean


def thin(steps: Floats, values: Floats, limit: int = MAX_COLUMNS) -> Curve:
    """Reduce a series (n,) to at most `limit` points; NaNs are left out of the means."""
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if len(values) <= limit:
        return Curve(steps, values, values, values, *values[-1:])
    starts = np.linspace(0, len(values), limit, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(values)))
    return Curve(
        np.add.reduceat(steps, starts) / sizes,
        np.add.reduceat(values, starts) / sizes,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
        values[-1],
    )


def smoothed(values: Floats) -> Floats:
    """Moving average over about 4% of the points around each one.

    At the start the window shrinks on both sides, so that a steep fall keeps its height; at the end only on the
    right, so that the curve does not end on one noisy point.
    """
    half = len(values) // MIN_TO_SMOOTH
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    back = np.minimum(half, position)
    ahead = np.minimum(back, len(values) - 1 - position)
    return np.asarray((sums[position + ahead + 1] - sums[position - back]) / (ahead + back + 1))


def style_panel(axes: Axes, theme: Theme, title: str, xlabel: str, ylabel: str = "") -> None:
    """Title, labels, grid and colours of one panel; scales and ticks stay as they are."""
    axes.set_title(title, loc="left", color=theme.text, fontsize=12, fontweight="bold", pad=10)
    axes.set_facecolor(theme.page)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=9.5, length=3)
    axes.set_xlabel(xlabel, color=theme.muted, fontsize=9.5)
    axes.set_ylabel(ylabel, color=theme.muted, fontsize=9.5)


def style_axes(axes: Axes, theme: Theme, title: str) -> None:
    """`style_panel`, with ticks, for a panel whose x axis is the step."""
    style_panel(axes, theme, title, "step")
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def draw_legend(axes: Axes, theme: Theme) -> None:
    """A legend at the upper right, where a falling curve leaves room."""
    axes.legend(
        loc="upper right", fontsize=9.5, labelcolor=theme.text, facecolor=theme.page, edgecolor="none", framealpha=0.85
    )


def draw_line(axes: Axes, curve: Curve, color: Any, label: str, smooth: bool = True) -> None:
    """A curve with its spread behind it; a few points get markers, since a line through one point shows nothing."""
    mean = smoothed(curve.mean) if smooth else curve.mean
    if mean is not curve.mean or (curve.high > curve.low).any():
        axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(curve.steps, curve.mean, color=color, alpha=0.3, linewidth=0.8)
    marker = "o" if len(mean) <= 30 else ""
    axes.plot(curve.steps, mean, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)


def render(paint: Callable[[Theme], Figure], name: str, title: str, caption: str, alt: str) -> Picture:
    """Paint a picture once for every theme."""
    images, size = [], (0, 0)
    for theme in (LIGHT, DARK):
        figure = paint(theme)
        figure.set_facecolor(theme.page)
        canvas = FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor=theme.page)
        images.append(buffer.getvalue())
        size = canvas.get_width_height()
    return Picture(name, title, caption, alt, images[0], images[1], *size)


def new_figure(height: float, rows: int = 1, columns: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels; width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    return figure, list(np.ravel(figure.subplots(rows, columns)))
