"""Pictures of the benchmark ``routers``, drawn from its rows; ``results/routers-PART.png``.

``python -m benchmarks.routers.pictures`` draws them again from the recorded runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import pictures, record
from benchmarks.routers import BENCHMARK, clusters, text
from benchmarks.spec import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, SECOND, MUTED = "#2557d6", "#d9480f", "#5b6470"


NEAR = 0.06  # nats above the dense model, beyond which a router is drawn at the upper edge, with its loss


def number(row: Row, column: str) -> float:
    """Of a row as it was made, or as it was read from the CSV."""
    return float(str(row[column]))


def single(row: Row) -> list[float]:
    """The values of the single seeds."""
    return [float(value) for value in str(row["values"]).split()]


def dots(axes: "Axes", rows: list[Row], values: Callable[[Row], list[float]], color: str, label: str = "") -> None:
    """One line per row, from the top: its values as dots, joined from least to greatest, and their mean as a bar."""
    for place, row in enumerate(rows):
        found = values(row)
        center = sum(found) / len(found)
        axes.plot([min(found), max(found)], [place, place], color=color, alpha=0.35, linewidth=3)
        axes.plot(found, [place] * len(found), "o", color=color, markersize=4.5, label=label if place == 0 else None)
        axes.plot([center], [place], "|", color=color, markersize=15, markeredgewidth=2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [str(row["router"]) for row in rows])


def text_figure(rows: list[Row]) -> "Figure":
    """Held-out loss by router, and loss against speed."""
    figure, (left, right) = pictures.figure(7.0, columns=2)
    rows = sorted(rows, key=lambda row: number(row, "loss"))
    dense = next(row for row in rows if row["router"] == text.DENSE)
    pictures.style(left, "Held-out loss", "nats per token; dots are seeds")
    left.axvline(number(dense, "loss"), color=MUTED, linewidth=1, linestyle="--")
    dots(left, rows, single, ACCENT)
    pictures.style(right, "Loss and speed", "tokens per second of a training step", "held-out loss")
    lowest, highest = number(rows[0], "loss"), number(dense, "loss") + NEAR
    gap = (highest - lowest) / 26  # between lines of text
    label_y, last_x = lowest - 2 * gap, max(number(row, "tokens_per_s") for row in rows)
    for row in rows:
        x, loss = number(row, "tokens_per_s"), number(row, "loss")
        inside = loss <= highest
        y, color = min(loss, highest), MUTED if row is dense else SECOND
        label_y = max(y, label_y + gap)
        right.plot(x, y, "o" if inside else "^", color=color, markersize=6)
        right.plot([x, 1.12 * last_x], [y, label_y], color=color, linewidth=0.6, alpha=0.4)
        name = str(row["router"]) if inside else f"{row['router']}: {loss:.2f}"
        right.annotate(name, (1.13 * last_x, label_y), fontsize=7.5, va="center")
    right.set_xlim(right=1.5 * last_x)
    right.set_xticks([tick for tick in right.get_xticks() if tick <= 1.05 * last_x])
    return figure


def clusters_figure(rows: list[Row]) -> "Figure":
    """Accuracy and cluster entropy by router, with cubic and with linear experts."""
    figure, (left, right) = pictures.figure(7.5, columns=2)
    by_case = {case: {row["router"]: row for row in rows if row.get("case") == case} for case in clusters.CASES}
    order = sorted(by_case["cubic"], key=lambda key: -number(by_case["cubic"][key], "accuracy"))
    for case, color in zip(clusters.CASES, (ACCENT, SECOND), strict=True):
        found = [by_case[case][key] for key in order]
        dots(left, found, single, color, f"{case} experts")
        gated = [row for row in found if row["router"] not in clusters.SINGLES]
        dots(right, gated, lambda row: [number(row, "cluster_entropy")], color, f"{case} experts")
    pictures.style(left, "Accuracy on the clustered problem", "share of test examples; dots are seeds")
    left.legend(frameon=False, loc="upper left")
    left.axvline(clusters.CEILING, color=MUTED, linewidth=1, linestyle="--")
    pictures.style(right, "Does an expert keep to a cluster?", "H(cluster | expert) in nats; 0: yes, 1.39: not at all")
    return figure


def multitask_figure(rows: list[Row]) -> "Figure":
    """Recovered support by router, with given and with learned experts."""
    figure, panels = pictures.figure(6.5, columns=2)
    titles = {"known": "Experts given, gates learned", "learned": "Experts and gates learned"}
    for axes, (case, title) in zip(panels, titles.items(), strict=True):
        found = sorted((row for row in rows if row.get("case") == case), key=lambda row: -number(row, "f1"))
        pictures.style(axes, title, "F1 of the recovered experts; dots are seeds")
        dots(axes, found, single, ACCENT)
    return figure


def tabular_figure(rows: list[Row]) -> "Figure":
    """What each model gains over the MLP on the same split."""
    figure, panels = pictures.figure(5.0, rows=2, columns=2)
    for axes, case in zip(panels, dict.fromkeys(row["case"] for row in rows), strict=False):
        found = [row for row in rows if row["case"] == case]
        base = single(found[0])
        metric = {"R2": "R^2"}.get(str(found[0]["metric"]), "accuracy")
        pictures.style(axes, str(case), f"{metric} minus that of the MLP on the same split")
        axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
        axes.locator_params(axis="x", nbins=5)

        def gains(row: Row, base: list[float] = base) -> list[float]:
            return [value - start for value, start in zip(single(row), base, strict=True)]

        dots(axes, [row | {"router": row["model"]} for row in found[1:]], gains, ACCENT)
    return figure


FIGURES: dict[str, Callable[[list[Row]], "Figure"]] = {
    "text": text_figure,
    "clusters": clusters_figure,
    "multitask": multitask_figure,
    "tabular": tabular_figure,
}


def draw(part: str, rows: list[Row]) -> Path:
    """Write the picture of a part."""
    return pictures.save(FIGURES[part](rows), f"routers-{part}")


if __name__ == "__main__":
    for name in FIGURES:
        print(draw(name, [dict(row) for row in record.latest(BENCHMARK, name)]))
