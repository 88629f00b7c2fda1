"""Pictures of the experts: who gets the tokens (a heat map a layer), and how balanced every layer is.

Shapes: n records, C columns of a picture, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moe.train.formats import compact
from moe.train.metrics import RunMetrics
from moe.train.picture_style import (
    DPI,
    MAX_COLUMNS,
    ROUND,
    WIDTH,
    Curve,
    Floats,
    Picture,
    Theme,
    new_figure,
    render,
    smoothed,
    style_axes,
    thin,
)

# The colour scale of the expert load is the same for every run, so that two runs can be compared by eye.
_MAX_LOAD = 4.0


def load_columns(steps: Floats, load_nE: Floats, limit: int = MAX_COLUMNS) -> Floats:
    """Mean load over equal spans of steps, (C, E), C <= limit. A span without a record repeats the one before it."""
    spans = min(limit, len(steps))
    width = max(float(steps[-1] - steps[0]), 1e-9) / max(spans - 1, 1)
    index = np.minimum(np.rint((steps - steps[0]) / width).astype(np.int64), spans - 1)
    total_CE = np.zeros((spans, load_nE.shape[1]))
    np.add.at(total_CE, index, load_nE)
    count_C = np.bincount(index, minlength=spans)
    filled = np.maximum.accumulate(np.where(count_C > 0, np.arange(spans), 0))
    return np.asarray((total_CE / np.maximum(count_C, 1)[:, None])[filled])


def _layer_records(metrics: RunMetrics, name: str, key: str) -> tuple[Floats, list[Any]]:
    found = [(record["step"], (record.get("layers") or {}).get(name, {}).get(key)) for record in metrics.train]
    found = [(step, value) for step, value in found if value is not None]
    return np.array([step for step, _ in found], dtype=np.float64), [value for _, value in found]


def draw_expert_load(metrics: RunMetrics) -> Picture | None:
    """Steps x experts, one panel a layer; colour is the load relative to an equal share. None without MoE layers."""
    panels: list[tuple[str, Floats, Floats]] = []
    names = metrics.layer_names()
    limit = _LoadGrid.of(max(len(names), 1)).pixels[0]
    for name in names:
        steps, loads = _layer_records(metrics, name, "load")
        # A step of NaNs has nulls in its load, and lines of another length come from a damaged file.
        good = np.array([len(load) == len(loads[-1]) > 0 and None not in load for load in loads], dtype=bool)
        if good.any():
            load_nE = np.array([load for load, fits in zip(loads, good, strict=True) if fits], dtype=np.float64)
            columns_CE = load_columns(steps[good], load_nE, limit) * load_nE.shape[1]
            panels.append((name, steps[good], columns_CE))
    if not panels:
        return None
    last = np.concatenate([relative_CE[-1] for _, _, relative_CE in panels])
    alt = (
        f"Heat maps of expert load against steps, one for each of {len(panels)} MoE layers; 1 is an equal share. "
        f"At the end the loads lie between {last.min():.2f} and {last.max():.2f}."
    )
    caption = (
        "Load relative to an equal share: 1 is balanced, 2 is twice its share. Every run has the same colour scale."
    )
    return render(lambda theme: _paint_load(panels, theme), "expert_load", "Expert load", caption, alt)


@dataclass(frozen=True)
class _LoadGrid:
    """Where the panels of the load picture go, in inches."""

    columns: int
    rows: int
    panel_width: float
    panel_height: float
    left: float = 0.75
    right: float = 1.0
    top: float = 0.8
    bottom: float = 0.6
    gap_x: float = 0.25
    gap_y: float = 0.42

    @classmethod
    def of(cls, panels: int) -> "_LoadGrid":
        columns = 1 if panels == 1 else 2 if panels <= 4 else 4 if panels <= 24 else 6
        height = {1: 3.2, 2: 1.9, 4: 1.35, 6: 1.05}[columns]
        return cls(
            columns,
            math.ceil(panels / columns),
            (WIDTH - cls.left - cls.right + cls.gap_x) / columns - cls.gap_x,
            height,
        )

    @property
    def height(self) -> float:
        return self.top + self.bottom + self.rows * (self.panel_height + self.gap_y) - self.gap_y

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height of one panel."""
        return min(MAX_COLUMNS, int(self.panel_width * DPI)), int(self.panel_height * DPI)

    def place(self, index: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel in parts of the figure."""
        row, column = divmod(index, self.columns)
        x = self.left + column * (self.panel_width + self.gap_x)
        y = self.height - self.top - row * (self.panel_height + self.gap_y) - self.panel_height
        return x / WIDTH, y / self.height, self.panel_width / WIDTH, self.panel_height / self.height


def _paint_load(panels: list[tuple[str, Floats, Floats]], theme: Theme) -> Figure:
    grid = _LoadGrid.of(len(panels))
    figure = Figure(figsize=(WIDTH, grid.height), dpi=DPI)
    figure.text(
        grid.left / WIDTH,
        1 - 0.3 / grid.height,
        "Expert load",
        fontsize=12,
        fontweight="bold",
        color=theme.text,
        va="center",
    )
    colors = LinearSegmentedColormap.from_list("load", theme.load, N=65)  # few enough that the PNG compresses well
    norm = LogNorm(1 / _MAX_LOAD, _MAX_LOAD)
    for index, (name, steps, relative_CE) in enumerate(panels):
        axes = figure.add_axes(grid.place(index))
        num_columns, num_experts = relative_CE.shape
        margin = max(float(steps[-1] - steps[0]) / max(num_columns - 1, 1), 1.0) / 2
        extent = (steps[0] - margin, steps[-1] + margin, num_experts - 0.5, -0.5)
        image = np.clip(relative_CE.T, 1 / _MAX_LOAD, _MAX_LOAD)
        # Without interpolation experts have sharp edges; with fewer pixels than experts it would skip some of them.
        interpolation = "nearest" if num_experts <= grid.pixels[1] else "antialiased"
        axes.imshow(image, cmap=colors, norm=norm, aspect="auto", extent=extent, interpolation=interpolation)
        axes.set_title(f"layer {name}", loc="left", fontsize=9, color=theme.muted, pad=3)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=theme.muted, labelsize=8, length=2)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, 6 // grid.columns + 1), integer=True, steps=ROUND))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.yaxis.set_major_locator(MaxNLocator(min(4, num_experts), integer=True, steps=ROUND))
        axes.tick_params(labelbottom=index + grid.columns >= len(panels), labelleft=index % grid.columns == 0)
    middle_x, middle_y = (grid.left + WIDTH - grid.right) / 2, (grid.bottom + grid.height - grid.top) / 2
    label: dict[str, Any] = {"fontsize": 9.5, "color": theme.muted, "ha": "center", "va": "center"}
    figure.text(middle_x / WIDTH, 0.2 / grid.height, "step", **label)
    figure.text(0.25 / WIDTH, middle_y / grid.height, "expert", rotation=90, **label)
    _load_scale(figure, theme, colors, norm, grid.height - grid.top, min(grid.height - grid.top - grid.bottom, 3.2))
    return figure


def _load_scale(figure: Figure, theme: Theme, colors: Colormap, norm: Normalize, top: float, length: float) -> None:
    height = figure.get_figheight()
    axes = figure.add_axes(((WIDTH - 0.78) / WIDTH, (top - length) / height, 0.14 / WIDTH, length / height))
    bar = figure.colorbar(ScalarMappable(norm, colors), cax=axes, ticks=[0.25, 0.5, 1, 2, 4])
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=theme.muted, labelsize=9, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]


def draw_balance(metrics: RunMetrics) -> Picture | None:
    """Max violation, router entropy and dropped share over the steps, one line a layer. None without MoE layers."""
    names = metrics.layer_names()
    fields = (
        ("Max violation", "max_violation"),
        ("Router entropy", "entropy"),
        ("Dropped assignments (%)", "dropped_fraction"),
    )
    curves: list[list[Curve]] = []
    for _, key in fields:
        scale = 100.0 if key == "dropped_fraction" else 1.0
        series = (_layer_records(metrics, name, key) for name in names)
        curves.append([thin(steps, scale * np.array(values, dtype=np.float64)) for steps, values in series])
    if not names:
        return None

    def paint(theme: Theme) -> Figure:
        few = len(names) <= 6
        figure, all_axes = new_figure(4.0, columns=3)
        for axes, (title, key), lines in zip(all_axes, fields, curves, strict=True):
            style_axes(axes, theme, title)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND))
            _paint_layers(axes, theme, names, lines, few)
            top = max((float(line.mean.max()) for line in lines if len(line.mean)), default=0.0)
            if key != "entropy":
                axes.set_ylim(0, max(top * 1.1, 0.1))
        if few:
            handles, labels = all_axes[0].get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=6, frameon=False, labelcolor=theme.text, fontsize=9.5
            )
        else:
            _layer_scale(figure, all_axes, theme, len(names), names)
        return figure

    final = [line.mean[-1] for line in curves[0] if len(line.mean)]
    alt = f"Max violation, router entropy and dropped assignments against steps for each of {len(names)} MoE layers."
    if final:
        alt += f" The last max violation is {np.mean(final):.2f} on average and {np.max(final):.2f} in the worst layer."
    caption = "Max violation: how far the busiest expert is above the mean (0 is balanced). Moving averages."
    return render(paint, "balance", "Balance", caption, alt)


def _layer_colors(theme: Theme, count: int) -> ListedColormap:
    return ListedColormap(colormaps["viridis"](np.linspace(*theme.layers, max(count, 2)))[:count])


def _paint_layers(axes: Axes, theme: Theme, names: list[str], lines: list[Curve], few: bool) -> None:
    colors = _layer_colors(theme, len(names)) if len(names) > 1 else ListedColormap([theme.accent])
    drawn = False
    for index, (name, line) in enumerate(zip(names, lines, strict=True)):
        if len(line.mean):
            drawn = True
            marker = "o" if len(line.mean) <= 30 and few else ""
            style: dict[str, Any] = {
                "linewidth": 1.6 if few else 0.9,
                "alpha": 1.0 if few else 0.75,
                "marker": marker,
                "markersize": 3.5,
            }
            axes.plot(line.steps, smoothed(line.mean), color=colors(index), label=f"layer {name}", **style)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=theme.muted)
        axes.set_yticks([])
        axes.set_xticks([])


def _layer_scale(figure: Figure, all_axes: list[Axes], theme: Theme, count: int, names: list[str]) -> None:
    mappable = ScalarMappable(Normalize(-0.5, count - 0.5), _layer_colors(theme, count))
    ticks = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
    bar = figure.colorbar(mappable, ax=all_axes, ticks=ticks.tolist(), aspect=28, pad=0.015)
    bar.ax.set_yticklabels([names[tick] for tick in ticks])
    bar.ax.tick_params(colors=theme.muted, labelsize=9, length=0)
    bar.set_label("layer", color=theme.muted, fontsize=9.5)
    bar.outline.set_visible(False)  # type: ignore[operator]
