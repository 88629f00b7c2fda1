"""Tables and pictures of checks and sweeps."""

import math
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from moe.scaling.coordinates import ACTIVATION, UPDATE, Verdict
from moe.train.formats import compact
from moe.train.mup.check import LIMIT, CheckResult
from moe.train.mup.sweep import Optimum, SweepRun, optima, shift
from moe.train.picture_style import LIGHT, new_figure, style_axes

_BLUES = ("#9ec5f4", "#6a9fe8", "#3f78d8", "#2557d6", "#173a94", "#0b1f57")  # from small to large


def render_check(result: CheckResult, console: Console) -> None:
    """A row for each kind of module at the last step, and every size that fails at any step."""
    last = result.options.num_steps
    values = sorted(set(result.options.values))
    table = Table(title=f"after {last} steps, {result.parametrization} parametrization", title_justify="left")
    for name in ("module", "quantity", *(f"{result.options.axis} {value}" for value in values), "change", ""):
        table.add_column(name, justify="left" if name in ("module", "quantity", "") else "right", no_wrap=True)
    for verdict in result.verdicts:
        if verdict.step == last:
            table.add_row(*_cells(verdict, values))
    console.print(table)
    for verdict in result.failed:
        if verdict.step != last:
            console.print(
                f"step {verdict.step}: {verdict.quantity} of {verdict.module} changes by {verdict.change:.0%}"
            )
    failed = {verdict.module for verdict in result.failed}
    console.print(
        f"pass: nothing changes by more than {LIMIT:.0%} over {result.options.axis} {values[0]} to {values[-1]}"
        if not failed
        else f"fail: {len(failed)} kinds of modules change by more than {LIMIT:.0%}: {', '.join(sorted(failed))}"
    )


def _cells(verdict: Verdict, values: list[int]) -> list[str]:
    sizes = [f"{verdict.sizes[value]:.4f}" for value in values]
    mark = "not judged" if not verdict.judged else "ok" if verdict.change <= LIMIT else "FAIL"
    return [verdict.module, verdict.quantity, *sizes, f"{verdict.change:.0%}", mark]


def draw_check(results: list[CheckResult], path: Path) -> None:
    """A PNG: sizes at the last step over the axis, activations above and updates below, a column per parametrization."""
    figure, panels = new_figure(7.0, rows=2, columns=len(results), width=6.2 * len(results))
    for column, result in enumerate(results):
        for row, quantity in enumerate((ACTIVATION, UPDATE)):
            axes = panels[row * len(results) + column]
            style_axes(axes, LIGHT, f"{result.parametrization}: {quantity} after {result.options.num_steps} steps")
            for verdict in result.verdicts:
                if verdict.step == result.options.num_steps and verdict.quantity == quantity:
                    look: dict[str, Any] = {} if verdict.judged else {"linestyle": "--", "alpha": 0.5}
                    axes.plot(
                        *zip(*verdict.sizes.items(), strict=True), marker="o", markersize=3, linewidth=1.4, **look
                    )
            _log_axis(axes, sorted(set(result.options.values)), result.options.axis)
            axes.set_yscale("log")
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)
    figure.set_facecolor(LIGHT.page)
    figure.savefig(path, format="png", facecolor=LIGHT.page)


def _log_axis(axes: Any, values: list[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel(name, color=LIGHT.muted)


def render_sweep(runs: list[SweepRun], axis: str, console: Console) -> None:
    """A row per value: losses by learning rate, the optimum, and how far it moves."""
    rates = sorted({run.lr for run in runs})
    found = optima(runs)
    table = Table(title="held-out loss, mean over seeds", title_justify="left")
    for name in (axis, *(f"lr {lr:g}" for lr in rates), "best lr", "of seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        losses = [[run.eval_loss for run in runs if (run.value, run.lr) == (each.value, lr)] for lr in rates]
        cells = [f"{sum(values) / len(values):.4f}" if values else "" for values in losses]
        best = f"{each.lr:.2e}" + (" (edge)" if each.at_edge else "")
        table.add_row(str(each.value), *cells, best, f"{each.low:.2e} to {each.high:.2e}")
    console.print(table)
    console.print(f"the best learning rate moves by a factor of {shift(found):.2f} over {axis} {_range(found)}")


def _range(found: list[Optimum]) -> str:
    return f"{min(each.value for each in found)} to {max(each.value for each in found)}"


def draw_sweeps(sweeps: dict[str, list[SweepRun]], axis: str, path: Path) -> None:
    """A PNG: loss against learning rate, a line per value and a panel per sweep, with the optima marked."""
    figure, panels = new_figure(4.6, columns=len(sweeps), width=6.2 * len(sweeps))
    for axes, (name, runs) in zip(panels, sweeps.items(), strict=True):
        style_axes(axes, LIGHT, name)
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
            axes.plot([each.lr], [each.eval_loss], marker="*", markersize=11, color=color, markeredgecolor=LIGHT.page)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate", color=LIGHT.muted)
        axes.set_ylabel("held-out loss", color=LIGHT.muted)
        axes.legend(fontsize=9, frameon=False, labelcolor=LIGHT.text)
    finite = [run.eval_loss for runs in sweeps.values() for run in runs if math.isfinite(run.eval_loss)]
    low, high = min(finite), sorted(finite)[int(len(finite) * 0.9)]
    for axes in panels:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    figure.set_facecolor(LIGHT.page)
    figure.savefig(path, format="png", facecolor=LIGHT.page)
