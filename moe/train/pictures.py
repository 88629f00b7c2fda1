"""The pictures of a run: loss, learning rate and throughput here, the experts' in `expert_pictures.py`."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.train.expert_pictures import draw_balance, draw_expert_load
from moe.train.formats import compact
from moe.train.metrics import RunMetrics
from moe.train.picture_style import (
    HALF_WIDTH,
    MIN_TO_SMOOTH,
    ROUND,
    Picture,
    Theme,
    column,
    draw_legend,
    draw_line,
    new_figure,
    render,
    style_axes,
    thin,
)


def draw_pictures(metrics: RunMetrics) -> list[Picture]:
    """Draw every picture the run has numbers for: none without a step, no expert pictures without MoE layers."""
    pictures = [draw(metrics) for draw in (_loss, _lr, _throughput, draw_expert_load, draw_balance)]
    return [picture for picture in pictures if picture is not None]


def _loss(metrics: RunMetrics) -> Picture | None:
    train = thin(column(metrics.train, "step"), column(metrics.train, "loss"))
    held_out = thin(column(metrics.evals, "step"), column(metrics.evals, "loss"))
    if not len(train.mean) and not len(held_out.mean):
        return None

    def paint(theme: Theme) -> Figure:
        figure, [axes] = new_figure(4.6)
        style_axes(axes, theme, "Loss (nats per token)")
        if len(train.mean):
            draw_line(axes, train, theme.accent, f"training, last {train.last:.3f}")
        if len(held_out.mean):
            draw_line(axes, held_out, theme.second, f"held-out, last {held_out.last:.3f}", smooth=False)
        draw_legend(axes, theme)
        return figure

    caption = "Pale: as logged. Bold: moving average." if len(train.mean) >= MIN_TO_SMOOTH else ""
    alt = "Loss against steps."
    if len(train.mean):
        alt += f" Training loss goes from {train.mean[0]:.3f} at the start to {train.last:.3f} at the end."
    if len(held_out.mean):
        alt += f" The last held-out loss is {held_out.last:.3f}."
    return render(paint, "loss", "Loss", caption, alt)


def _lr(metrics: RunMetrics) -> Picture | None:
    curve = thin(column(metrics.train, "step"), column(metrics.train, "lr"))
    if not len(curve.mean):
        return None

    def paint(theme: Theme) -> Figure:
        figure, [axes] = new_figure(4.0, width=HALF_WIDTH)
        style_axes(axes, theme, "Learning rate")
        draw_line(axes, curve, theme.accent, "learning rate", smooth=False)
        axes.set_ylim(0, max(float(curve.high.max()) * 1.08, 1e-12))
        return figure

    alt = f"Learning rate against steps: at most {compact(curve.high.max())}, {compact(curve.mean[-1])} at the end."
    return render(paint, "lr", "Learning rate", "", alt)


def _throughput(metrics: RunMetrics) -> Picture | None:
    steps = column(metrics.train, "step")
    speed = thin(steps, column(metrics.train, "tokens_per_second"))
    mfu = thin(steps, 100 * column(metrics.train, "mfu"))
    if not len(speed.mean):
        return None

    def paint(theme: Theme) -> Figure:
        panels = [("Tokens per second", speed)] + ([("MFU (%)", mfu)] if len(mfu.mean) else [])
        figure, all_axes = new_figure(4.0, rows=len(panels), width=HALF_WIDTH)
        for axes, (title, curve) in zip(all_axes, panels, strict=True):
            style_axes(axes, theme, title)
            draw_line(axes, curve, theme.accent, title)
            axes.set_ylim(0, max(float(np.quantile(curve.high, 0.99)) * 1.15, 1e-9))
            axes.set_xlabel("step" if axes is all_axes[-1] else "")
            axes.yaxis.set_major_locator(MaxNLocator(5 if len(panels) == 1 else 3, steps=ROUND))
        return figure

    alt = f"Throughput against steps: median {compact(float(np.median(speed.mean)))} tokens per second."
    if len(mfu.mean):
        alt += f" Median model FLOPs utilisation {np.median(mfu.mean):.1f} percent."
    return render(paint, "throughput", "Throughput", "", alt)
