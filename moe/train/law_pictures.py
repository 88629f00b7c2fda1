"""The picture of a fitted scaling law: measured against predicted loss, and lines of equal loss over parameters and tokens."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moe.scaling.laws.own import OwnLaw, as_trained
from moe.train.formats import compact
from moe.train.picture_style import LIGHT, new_figure, style_panel

_GRID = 60  # points of the map of losses along each axis


def draw_fit(own: OwnLaw, path: Path) -> None:
    """Write a PNG of two panels."""
    figure, panels = new_figure(4.6, columns=2, width=11.0)
    _draw_errors(panels[0], own)
    _draw_map(panels[1], own)
    figure.set_facecolor(LIGHT.page)
    title = f"{own.law.form.formula}, {len(own.runs)} runs"
    figure.suptitle(title, x=0.01, ha="left", color=LIGHT.muted, fontsize=10)
    figure.savefig(path, format="png", facecolor=LIGHT.page)


def _draw_errors(axes: Axes, own: OwnLaw) -> None:
    measured = np.array([run.loss for run in own.runs])
    predicted, left_out = np.array(own.fitted.predicted), np.array(own.fitted.left_out)
    both = np.concatenate([measured, predicted])
    margin = 0.05 * (both.max() - both.min())
    ends = [both.min() - margin, both.max() + margin]
    axes.plot(ends, ends, color=LIGHT.muted, linewidth=1.0)
    axes.scatter(
        left_out, measured, facecolors="none", edgecolors=LIGHT.second, s=34, label="from the other runs", zorder=2
    )
    axes.scatter(predicted, measured, color=LIGHT.accent, s=16, label="from all runs", zorder=3)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    style_panel(axes, LIGHT, "Held-out loss, measured", "predicted loss")
    axes.legend(loc="lower right", fontsize=9.5, labelcolor=LIGHT.text, frameon=False)


def _draw_map(axes: Axes, own: OwnLaw) -> None:
    """Losses at the median expansion rate and granularity of the runs."""
    trained = as_trained(own.runs, own.fitted.form)
    params, tokens = (
        np.geomspace(values.min() / 1.5, values.max() * 1.5, _GRID) for values in (trained.params, trained.tokens)
    )
    grid_params, grid_tokens = (values.ravel() for values in np.meshgrid(params, tokens))
    expansion, granularity = (float(np.median(values)) for values in (trained.expansion, trained.granularity))
    everywhere = np.ones_like(grid_params)
    losses = own.law.form.loss(
        own.law.constants,
        type(trained)(
            params=grid_params,
            tokens=grid_tokens,
            expansion=expansion * everywhere,
            granularity=granularity * everywhere,
        ),
    ).reshape(_GRID, _GRID)
    axes.set_xscale("log")  # before the labels, which look for room on the page
    axes.set_yscale("log")
    lines = axes.contour(params, tokens, losses, levels=10, colors=LIGHT.muted, linewidths=1.0)
    axes.clabel(lines, fmt="%.3g", fontsize=8.5)
    axes.scatter(trained.params, trained.tokens, color=LIGHT.accent, s=20, zorder=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    counted = {"active": "active parameters", "total_blocks": "all parameters but embeddings"}[own.law.counted]
    style_panel(axes, LIGHT, f"Lines of equal loss over tokens, at E = {expansion:g}, G = {granularity:g}", counted)
