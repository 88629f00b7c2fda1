"""Tables and pictures of checks and sweeps."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from moe.scaling.coordinates import ACTIVATION, UPDATE, Verdict
from moe.train.formats import compact
from moe.train.mup.check import LIMIT, CheckResult
from moe.train.mup.sweep import Optimum, SweepRun, mean_loss, optima, shift
from moe.train.picture_style import LIGHT, new_figure, style_panel

_BLUES = ("#9ec5f4", "#6a9fe8", "#3f78d8", "#2557d6", "#173a94", "#0b1f57")  # from small to large
_QUALITATIVE = ("#2557d6", "#d9480f", "#2f9e44", "#9c36b5", "#e8a400", "#0c8599", "#c2255c", "#5b6470")
_MARKERS = ("o", "s", "^", "D")
# A parametrization that fails at all fails in most places: what to look at first.
_MAX_LISTED = 8


def render_check(result: CheckResult, console: Console) -> None:
    """For each quantity a row per kind of module at the last step, and the sizes that fail only before."""
    options, values = result.options, sorted(set(result.options.values))
    last = options.num_steps
    steps = f"{last} step{'s' if last > 1 else ''}"
    for quantity in (ACTIVATION, UPDATE):
        title = f"{quantity} after {steps}, {result.parametrization} parametrization, by {options.axis}"
        console.print(f"\n{title}")
        table = _table(["module", *map(str, values), "change", ""], texts=("module", ""))
        for verdict in result.verdicts:
            if (verdict.step, verdict.quantity) == (last, quantity):
                sizes = [f"{verdict.sizes[value]:.3g}" for value in values]
                table.add_row(verdict.module, *sizes, f"{verdict.change:.0%}", _mark(verdict))
        _print(console, table)
    console.print("-: not judged, as what the initial weights give shrinks by design")
    at_last = {(verdict.module, verdict.quantity) for verdict in result.failed if verdict.step == last}
    before = [verdict for verdict in result.failed if (verdict.module, verdict.quantity) not in at_last]
    for verdict in before[:_MAX_LISTED]:
        console.print(f"step {verdict.step}: {verdict.quantity} of {verdict.module} changes by {verdict.change:.0%}")
    if len(before) > _MAX_LISTED:
        console.print(f"... and {len(before) - _MAX_LISTED} more before step {last}; --json has all")
    console.print(_conclusion(result))


def _conclusion(result: CheckResult) -> str:
    values = sorted(set(result.options.values))
    if not result.failed:
        return f"pass: nothing changes by more than {LIMIT:.0%} over {result.options.axis} {values[0]} to {values[-1]}"
    failed = sorted({verdict.module for verdict in result.failed})
    kinds = "1 kind of module changes" if len(failed) == 1 else f"{len(failed)} kinds of modules change"
    return f"fail: {kinds} by more than {LIMIT:.0%}: {', '.join(failed)}"


def _mark(verdict: Verdict) -> str:
    return "-" if not verdict.judged else "ok" if verdict.change <= LIMIT else "FAIL"


def _table(columns: list[str], texts: tuple[str, ...] = ()) -> Table:
    """A table of numbers, but for the columns in ``texts``."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=True)
    return table


def _print(console: Console, table: Table) -> None:
    """Whole numbers and names, also where a line is then wider than the terminal."""
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, width=width, crop=False)


def draw_check(results: list[CheckResult], path: Path) -> None:
    """A PNG: sizes at the last step over the axis, activations above and updates below, a column per parametrization."""
    figure, panels = new_figure(8.0, rows=2, columns=len(results), width=2.6 + 5.0 * len(results))
    kinds = list(dict.fromkeys(verdict.module for result in results for verdict in result.verdicts))
    looks = {kind: _look(index) for index, kind in enumerate(kinds)}
    for column, result in enumerate(results):
        for row, quantity in enumerate((ACTIVATION, UPDATE)):
            shown = [
                verdict
                for verdict in result.verdicts
                if (verdict.step, verdict.quantity) == (result.options.num_steps, quantity)
            ]
            failed = any(verdict.judged and not verdict.change <= LIMIT for verdict in shown)
            axes = panels[row * len(results) + column]
            title = f"{result.parametrization}: {quantity}, {'fail' if failed else 'pass'}"
            style_panel(axes, LIGHT, title, result.options.axis, "root mean square")
            for verdict in shown:
                fade: dict[str, Any] = {} if verdict.judged else {"linestyle": "--", "alpha": 0.5}
                axes.plot(*zip(*verdict.sizes.items(), strict=True), **looks[verdict.module], **fade)
            axes.set_yscale("log")
            _log_axis(axes, sorted(set(result.options.values)))
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)
    handles = [Line2D([], [], label=kind, **look) for kind, look in looks.items()]
    handles.append(Line2D([], [], label="not judged", color=LIGHT.muted, linestyle="--", alpha=0.5))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False, labelcolor=LIGHT.text)
    _save(figure, path)


def _look(index: int) -> dict[str, Any]:
    """Of the line of a kind of module, the same in all panels."""
    return {
        "color": _QUALITATIVE[index % len(_QUALITATIVE)],
        "marker": _MARKERS[index // len(_QUALITATIVE) % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _log_axis(axes: Axes, ticks: list[float] | list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_facecolor(LIGHT.page)
    figure.savefig(path, format="png", facecolor=LIGHT.page)


def render_sweep(runs: list[SweepRun], axis: str, console: Console) -> None:
    """A row per learning rate with the losses of every value, then the optima, and how far they move."""
    found = optima(runs)
    rates = sorted({run.lr for run in runs})
    seeds = len({run.seed for run in runs})
    title = "held-out loss" + (f", mean over {seeds} seeds" if seeds > 1 else "")
    console.print(f"\n{title}, by {axis}")
    losses = _table(["lr", *(str(each.value) for each in found)])
    for lr in rates:
        losses.add_row(f"{lr:g}", *(_loss_cell(runs, each.value, lr) for each in found))
    _print(console, losses)
    console.print(f"best learning rate, by {axis}")
    best = _table([axis, "best lr", "from", "to", "loss", ""], texts=("",))
    for each in found:
        bounds = [f"{each.low:.2e}", f"{each.high:.2e}"] if seeds > 1 else ["", ""]
        note = "at the edge: try more rates" if each.at_edge else ""
        best.add_row(str(each.value), f"{each.lr:.2e}", *bounds, f"{each.eval_loss:.4f}", note)
    _print(console, best)
    if seeds > 1:
        console.print(f"from and to: the best rates of the {seeds} seeds alone")
    else:
        console.print("one seed says nothing about the uncertainty: use --seeds")
    if len(found) > 1:
        console.print(f"the best learning rate moves by a factor of {shift(found):.2f} over {axis} {_range(found)}")


def _loss_cell(runs: list[SweepRun], value: int, lr: float) -> str:
    loss = mean_loss(runs, value, lr)
    return "" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _range(found: list[Optimum]) -> str:
    return f"{min(each.value for each in found)} to {max(each.value for each in found)}"


def draw_sweeps(sweeps: dict[str, list[SweepRun]], axis: str, path: Path) -> None:
    """A PNG: loss against learning rate, a line per value and a panel per sweep, with the optima marked."""
    figure, panels = new_figure(4.6, columns=len(sweeps), width=6.2 * len(sweeps))
    for axes, (name, runs) in zip(panels, sweeps.items(), strict=True):
        style_panel(axes, LIGHT, name, "learning rate", "held-out loss")
        found = optima(runs)
        for index, each in enumerate(found):
            color = _BLUES[index * (len(_BLUES) - 1) // max(len(found) - 1, 1)]
            of_value = [run for run in runs if run.value == each.value]
            rates = sorted({run.lr for run in of_value})
            seeds = [[run.eval_loss for run in of_value if run.lr == lr] for lr in rates]
            means = [sum(losses) / len(losses) for losses in seeds]
            axes.fill_between(rates, list(map(min, seeds)), list(map(max, seeds)), color=color, alpha=0.15, linewidth=0)
            axes.plot(
                rates, means, marker="o", markersize=3.5, linewidth=1.6, color=color, label=f"{axis} {each.value}"
            )
            star: dict[str, Any] = {
                "marker": "*",
                "markersize": 13,
                "color": color,
                "markeredgecolor": LIGHT.page,
                "zorder": 4,
            }
            axes.plot([each.lr], [each.eval_loss], **star)
        _log_axis(axes, sorted({run.lr for run in runs}))
        axes.legend(fontsize=9, frameon=False, labelcolor=LIGHT.text)
    finite = sorted(run.eval_loss for runs in sweeps.values() for run in runs if math.isfinite(run.eval_loss))
    low, high = finite[0], finite[int((len(finite) - 1) * 0.9)]  # a rate that is far too large would flatten the rest
    margin = 0.08 * (high - low) or 0.1
    for axes in panels:
        axes.set_ylim(low - margin, high + margin)
    _save(figure, path)
