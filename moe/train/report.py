"""The page about a run: `report.html`, one self-contained file, and its pictures as PNG files in `pictures/`.

The page loads nothing and runs no script (its Content-Security-Policy forbids both), so it can be mailed, archived
and opened anywhere. Every text that came from the run (configuration, sample, events) is escaped.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from moe import __version__
from moe.train.formats import compact, duration
from moe.train.metrics import Record, RunMetrics, mean_balance, read_metrics
from moe.train.picture_style import Picture, column
from moe.train.pictures import draw_pictures

REPORT_FILE = "report.html"
PICTURES_DIR = "pictures"
_MAX_EVENTS = 500
_WIDE = ("loss", "expert_load", "balance")  # pictures that need the full width


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` and `pictures/*.png` into a run folder and return the page's path.

    Works on a run that is still going or that crashed: what is missing is left out. Raises ValueError where the
    folder is not a run.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    pictures = draw_pictures(metrics)
    folder = run_dir / PICTURES_DIR
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.light)
    path = run_dir / REPORT_FILE
    path.write_text(_page(metrics, pictures), encoding="utf-8")
    return path


def _page(metrics: RunMetrics, pictures: Sequence[Picture]) -> str:
    summary, environment = (
        _read_json(metrics.run_dir / "summary.json"),
        _read_json(metrics.run_dir / "environment.json"),
    )
    name = metrics.run_dir.resolve().name
    sections = [_picture_section(picture) for picture in pictures]
    if not metrics.train:
        sections.append(
            _section("No steps yet", '<p class="plain">The run has not finished a training step.</p>', wide=True)
        )
    elif not metrics.layer_names():
        text = "The run recorded no MoE layer (a dense model), so there are no experts to show."
        sections.append(_section("Experts", f'<p class="plain">{text}</p>', wide=True))
    sections += [_layers_section(metrics), _sample_section(summary), _events_section(metrics)]
    sections += [_table_section("Results", _leaves(summary, skip=("sample",))), _config_section(metrics.run_dir)]
    sections.append(_table_section("Environment", _leaves(environment)))
    keys = list(_keys(metrics, summary))
    template = resources.files("moe.train").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=_escape(f"{name}: training run"),
        name=_escape(name),
        facts="".join(_facts(metrics, summary, environment)),
        keys="\n".join(keys),
        columns=len(keys) if len(keys) <= 5 else math.ceil(len(keys) / 2),  # one row, or two about equal ones
        sections="\n".join(section for section in sections if section),
        footer=f"Written by moe {_escape(__version__)} from metrics.jsonl",
    )


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one where a crash left none or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def _first(*values: Any) -> float | None:
    return next((number for number in map(_number, values) if number is not None), None)


def _facts(metrics: RunMetrics, summary: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterable[str]:
    """Short facts under the title."""
    state = ("good", "finished") if summary else ("warn", "not finished: no summary.json")
    yield f'<li class="{state[0]}">{state[1]}</li>'
    if metrics.train:
        yield f"<li>{metrics.train[-1]['step']:,} steps</li>"
    if metrics.layer_names():
        experts = {len(layer.get("load") or ()) for layer in _last_layers(metrics).values()} - {0}
        count = f"{len(metrics.layer_names())} MoE layer{'s' if len(metrics.layer_names()) > 1 else ''}"
        yield f"<li>{count}{f' × {min(experts)} experts' if len(experts) == 1 else ''}</li>"
    processes = "{} process" if environment.get("world_size") == 1 else "{} processes"
    labels = {"device": "{}", "world_size": processes, "ep_size": "expert parallel {}", "zero_stage": "ZeRO-{}"}
    for key, label in labels.items():
        if environment.get(key) is not None:
            yield f"<li>{_escape(label.format(environment[key]))}</li>"
    if environment.get("git_commit"):
        yield f"<li>commit {_escape(str(environment['git_commit'])[:10])}</li>"
    skipped = _number(metrics.train[-1].get("skipped_steps")) if metrics.train else None
    if skipped:
        yield f'<li class="warn">skipped steps: {skipped:.0f}</li>'
    if metrics.skipped_lines:
        yield f'<li class="warn">unreadable lines in metrics.jsonl: {metrics.skipped_lines}</li>'


def _keys(metrics: RunMetrics, summary: Mapping[str, Any]) -> Iterable[str]:
    """The figures at the top; one that is not known is left out."""
    last = metrics.train[-1] if metrics.train else {}
    last_eval = metrics.evals[-1] if metrics.evals else {}
    losses = [loss for loss in map(_number, (record.get("loss") for record in metrics.train)) if loss is not None]
    held_out = _first(summary.get("eval_loss"), last_eval.get("loss"))
    perplexity = _first(summary.get("perplexity"), last_eval.get("perplexity"))
    speed, mfu = column(metrics.train, "tokens_per_second"), column(metrics.train, "mfu")
    balance = mean_balance(_last_layers(metrics).values())
    total = _first(summary.get("total_params"), summary.get("params"))
    active = _number(summary.get("active_params"))
    step_seconds = column(metrics.train, "step_seconds")
    seconds = _first(summary.get("seconds"))
    if seconds is None and np.isfinite(step_seconds).all() and len(step_seconds):
        seconds = float(step_seconds.sum())
    figures = [
        ("Training loss", f"{losses[-1]:.3f}" if losses else None, f"from {losses[0]:.3f}" if losses else ""),
        ("Held-out loss", None if held_out is None else f"{held_out:.3f}", "nats per token"),
        (
            "Perplexity",
            None if perplexity is None else f"{perplexity:,.2f}" if perplexity < 1000 else compact(perplexity),
            "held-out",
        ),
        ("Tokens", _short(_first(summary.get("tokens"), last.get("tokens"))), "trained on"),
        ("Tokens per second", _short(_median(speed)), "median"),
        ("MFU", None if _median(mfu) is None else f"{100 * _median(mfu):.1f}%", "median"),  # type: ignore[operator]
        ("Time", None if seconds is None else duration(seconds), ""),
        ("Parameters", _short(total), "" if active is None else f"{compact(active)} active per token"),
        ("Expert balance", None if balance is None else f"{balance:.2f}", "1 is even"),
    ]
    for label, figure, detail in figures:
        if figure is not None:
            yield f'<div class="key"><dt>{label}</dt><dd>{_escape(figure)}<small>{_escape(detail)}</small></dd></div>'


def _short(value: float | None) -> str | None:
    return None if value is None else compact(value)


def _median(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _section(title: str, body: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{_escape(title)}</h2>{body}</section>"


def _picture_section(picture: Picture) -> str:
    light, dark = (base64.b64encode(data).decode("ascii") for data in (picture.light, picture.dark))
    caption = f"<figcaption>{_escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f"<section{' class=wide' if picture.name in _WIDE else ''}><figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img src="data:image/png;base64,{light}" width="{picture.width}" height="{picture.height}" '
        f'alt="{_escape(picture.alt)}"></picture>{caption}</figure></section>'
    )


def _last_layers(metrics: RunMetrics) -> dict[str, Record]:
    """Every layer's last record; layers need not be logged at every step."""
    missing, found = set(metrics.layer_names()), {}
    for record in reversed(metrics.train):
        for name in missing & set(record.get("layers") or {}):
            found[name] = record["layers"][name]
        missing -= set(found)
        if not missing:
            break
    return {name: found[name] for name in metrics.layer_names()}


def _layers_section(metrics: RunMetrics) -> str:
    layers = _last_layers(metrics)
    if not layers:
        return ""
    columns = (
        ("max_violation", "Max violation"),
        ("entropy", "Entropy"),
        ("dropped_fraction", "Dropped"),
        ("logit_norm", "Logit norm"),
    )
    losses = sorted({name for layer in layers.values() for name in layer.get("losses") or {}})
    head = "".join(
        f'<th scope="col" class="number">{_escape(title)}</th>' for title in [title for _, title in columns] + losses
    )
    rows = []
    for name, layer in layers.items():
        cells = [_cell(layer.get(key), percent=key == "dropped_fraction") for key, _ in columns]
        cells += [_cell((layer.get("losses") or {}).get(loss)) for loss in losses]
        rows.append(
            f'<tr><th scope="row">{_escape(name)}</th><td>{_bars(layer.get("load") or [])}</td>{"".join(cells)}</tr>'
        )
    head = f'<th scope="col">Layer</th><th scope="col">Load of each expert</th>{head}'
    body = "".join(rows)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    note = '<p class="note">The dashed line is an equal share.</p>'
    return _section("MoE layers at the last step", note + table, wide=True)


def _cell(value: Any, percent: bool = False) -> str:
    number = _number(value)
    text = "–" if number is None else f"{100 * number:.2f}%" if percent else compact(number)
    return f'<td class="number">{text}</td>'


def _bars(load_E: Sequence[Any]) -> str:
    """A small bar chart of one layer's load as one SVG path, since 60 layers of 256 experts would be 15k elements."""
    loads = [_number(load) or 0.0 for load in load_E]
    if not loads or sum(loads) <= 0:
        return "–"
    relative = [load * len(loads) / sum(loads) for load in loads]
    top = max(2.0, *relative)
    width = 0.8 if len(loads) <= 64 else 1.0  # gaps between bars, while there is room for them
    path = "".join(f"M{i:g} 20v{-20 * value / top:.2f}h{width}V20z" for i, value in enumerate(relative))
    alt = f"{len(loads)} experts, least {min(relative):.2f} and greatest {max(relative):.2f} of an equal share"
    even = 20 - 20 / top
    return (
        f'<svg class="bars" viewBox="0 0 {len(loads)} 20" preserveAspectRatio="none" role="img" aria-label="{alt}">'
        f'<path d="{path}"/><line x1="0" x2="{len(loads)}" y1="{even:.2f}" y2="{even:.2f}"/></svg>'
    )


def _sample_section(summary: Mapping[str, Any]) -> str:
    sample = summary.get("sample")
    if not sample:
        return ""
    text = sample if isinstance(sample, str) else json.dumps(sample, indent=2, ensure_ascii=False)
    return _section("A sample of what it writes", f'<pre class="sample">{_escape(text)}</pre>', wide=True)


def _events_section(metrics: RunMetrics) -> str:
    if not metrics.events:
        return ""
    shown = metrics.events[-_MAX_EVENTS:]
    left_out = len(metrics.events) - len(shown)
    note = (
        f'<p class="note">The last {len(shown)}; {left_out} earlier ones are in metrics.jsonl.</p>' if left_out else ""
    )
    rows = "".join(
        f'<tr><td class="number">{_escape(e["step"])}</td><td>{_escape(e.get("message", ""))}</td></tr>' for e in shown
    )
    head = (
        '<thead><tr><th scope="col" class="number">Step</th><th scope="col" style="width:99%">Event</th></tr></thead>'
    )
    return _section("Events", f'{note}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>', wide=True)


def _leaves(values: Mapping[str, Any], skip: Sequence[str] = (), prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, Mapping):
            rows += _leaves(value, prefix=f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            rows.append((f"{prefix}{key}", " ".join(value)))
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _table_section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f'<tr><th scope="row">{_escape(name)}</th><td>{_escape(value)}</td></tr>' for name, value in rows)
    return _section(title, f'<div class="scroll"><table><tbody>{body}</tbody></table></div>', wide=title == "Results")


def _config_section(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").rstrip()
    return _section("Configuration", f'<div class="scroll"><pre>{_escape(text)}</pre></div>')
