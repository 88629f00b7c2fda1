"""The picture of replayed routing traces: load, rows and exchange time by expert-parallel degree."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from moe.scaling.replay import Replay
from moe.train.formats import compact
from moe.train.picture_style import LIGHT, Theme, new_figure, style_panel

_COLORS = ("#2557d6", "#d9480f", "#0b7a5b", "#8a3ffc", "#5b6470")
_MARKERS = ("o", "s", "^", "D", "v")


def draw_replays(replays: list[Replay], title: str, path: Path) -> None:
    """Write a PNG with a line per trace in each of three panels."""
    figure, panels = new_figure(4.4, columns=3, width=13.0)
    _style(panels[0], LIGHT, "Load of the fullest rank / mean", replays)
    _style(panels[1], LIGHT, "Rows sent per token", replays)
    _style(panels[2], LIGHT, "Exchange per layer, predicted (ms)", replays)
    for index, name in enumerate(dict.fromkeys(row.trace for row in replays)):
        rows = [row for row in replays if row.trace == name]
        degrees = [row.ep_size for row in rows]
        look: dict[str, Any] = {
            "color": _COLORS[index % 5],
            "marker": _MARKERS[index % 5],
            "linewidth": 1.8,
            "markersize": 5,
        }
        panels[0].plot(degrees, [row.imbalance for row in rows], label=name, **look)
        panels[1].plot(degrees, [row.rows_per_token for row in rows], label=name, **look)
        panels[2].plot(degrees, [1e3 * row.seconds for row in rows], label=name, **look)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(bottom=0)
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    panels[2].yaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="upper left", fontsize=9.5, labelcolor=LIGHT.text, frameon=False)
    _save(figure, title, path)


def _style(axes: Axes, theme: Theme, title: str, replays: list[Replay]) -> None:
    style_panel(axes, theme, title, "expert-parallel degree")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.ep_size for row in replays})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.set_facecolor(LIGHT.page)
    figure.suptitle(title, x=0.01, ha="left", color=LIGHT.muted, fontsize=10)
    figure.savefig(path, format="png", facecolor=LIGHT.page)
