"""The report: self-contained, escaped, and drawn for every shape of run, from three dense steps to 60 layers of 64 experts."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from moe.train.expert_pictures import load_columns
from moe.train.metrics import read_metrics
from moe.train.picture_style import MAX_COLUMNS, smoothed, thin
from moe.train.pictures import draw_pictures
from moe.train.report import write_report

ATTACK = "<script>alert('x')</script> & <img src=https://example.com/x.png onerror=alert(1)>"
DENSE = {"loss.png", "lr.png", "throughput.png"}
MOE = DENSE | {"expert_load.png", "balance.png"}


def make_run(
    run: Path, steps: int = 12, layers: int = 2, experts: int = 4, *, skew: float = 1.0, every: int = 1, **train: Any
) -> Path:
    """Write a finished run whose loss falls and whose experts grow balanced."""
    run.mkdir(parents=True)
    rng = np.random.default_rng(0)
    logits_LE = rng.normal(0, skew, (layers, experts))
    lines = []
    for step in range(1, steps + 1, every):
        done = step / steps
        loads_LE = np.exp(logits_LE * (1 - done) + rng.normal(0, 0.05, logits_LE.shape))
        loads_LE /= loads_LE.sum(axis=1, keepdims=True)
        record = {
            "kind": "train", "step": step, "loss": 2 + 4 * math.exp(-5 * done), "lr": 3e-4 * (1 - done), "grad_norm": 1.0,
            "tokens": 1024 * step, "tokens_per_second": 1500.0, "mfu": None, "step_seconds": 0.5, "skipped_steps": 0,
            "layers": {
                str(index): {
                    "load": load_E.round(5).tolist(), "max_violation": float(load_E.max() * experts - 1),
                    "dropped_fraction": 0.01, "entropy": 1.2, "logit_norm": 3.0, "losses": {"switch": 1.02, "z": 0.1},
                }
                for index, load_E in enumerate(loads_LE)
            },
        }  # fmt: skip
        lines.append(record | train)
    lines.append({"kind": "eval", "step": steps, "loss": 2.5, "perplexity": 12.18})
    lines.append({"kind": "event", "step": 2, "message": f"resumed {ATTACK}"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text(f"moe:\n  note: {ATTACK}\n  price: $title\n")
    environment = {
        "python": "3.11",
        "packages": {"torch": "2.13.0"},
        "device": ATTACK,
        "command": ["moe", "train", ATTACK],
    }
    (run / "environment.json").write_text(json.dumps(environment | {"world_size": 2, "git_commit": "0123456789abcdef"}))
    summary = {"eval_loss": 2.5, "perplexity": 12.18, "tokens": 12288, "seconds": 173.0, "sample": f"Once {ATTACK}"}
    (run / "summary.json").write_text(json.dumps(summary | {"total_params": 13_200_000, "active_params": 4_100_000}))
    return run


class Page(HTMLParser):
    """Collects a page's elements and visible text, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "img", "source", "line", "path", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag == name]


def report(run: Path) -> tuple[Page, set[str]]:
    """Write the report; gives its page and its pictures, each of which must be a PNG with something drawn in it."""
    path = write_report(run)
    assert path == run / "report.html"
    pictures = sorted((run / "pictures").iterdir())
    for picture in pictures:
        pixels = imread(picture)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 900 and pixels.std() > 0.01, picture.name
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.tags("img")) == len(pictures)
    return page, {picture.name for picture in pictures}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, set[str]]:
    run = make_run(tmp_path_factory.mktemp("runs") / "my & <run>")
    return run, *report(run)


def test_the_page_loads_nothing_and_runs_nothing(finished: tuple[Path, Page, set[str]]) -> None:
    _, page, _ = finished
    for tag, attrs in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "video", "audio")
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "data", "action", "poster"):
                assert value is not None and value.startswith("data:image/png;base64,"), (tag, name)
    text = (finished[0] / "report.html").read_text()
    assert "url(" not in text and "@import" not in text
    [policy] = [meta for meta in page.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_text_is_escaped(finished: tuple[Path, Page, set[str]]) -> None:
    run, page, _ = finished
    text = (run / "report.html").read_text()
    assert "<script" not in text and "<img src=https" not in text
    assert page.text.count(ATTACK) == 6  # sample, event, config; and device twice and command
    assert "price: $title" in page.text, "what a config holds is no placeholder"
    assert page.text.count("my & <run>") == 2


def test_key_figures(finished: tuple[Path, Page, set[str]]) -> None:
    _, page, names = finished
    assert names == MOE
    for text in ("2.500", "12.18", "12.3k", "1.5k", "2m 53s", "13.2M", "4.1M active per token", "finished", "12 steps",
                 "2 MoE layers × 4 experts", "2 processes", "commit 0123456789", "packages.torch"):  # fmt: skip
        assert text in page.text, text
    assert "not finished" not in page.text and "MFU" not in page.text


def test_pictures_have_texts_and_a_dark_version(finished: tuple[Path, Page, set[str]]) -> None:
    run, page, _ = finished
    assert all(len(str(img["alt"])) > 30 for img in page.tags("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.tags("svg"))
    assert len(page.tags("svg")) == 2
    for source, img in zip(page.tags("source"), page.tags("img"), strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        dark, light = (
            imread(io.BytesIO(base64.b64decode(str(data).split(",")[1]))) for data in (source["srcset"], img["src"])
        )
        assert light.shape == dark.shape == (int(str(img["height"])), int(str(img["width"])), 4)
        assert light[0, 0, :3].min() == 1.0 and dark[0, 0, :3].max() < 0.2
    loss = base64.b64encode((run / "pictures" / "loss.png").read_bytes()).decode()
    assert loss in str(page.tags("img")[0]["src"])


def test_dense_run(tmp_path: Path) -> None:
    page, names = report(make_run(tmp_path / "run", layers=0))
    assert names == DENSE
    assert "no MoE layer" in page.text and "Expert balance" not in page.text


def test_crashed_run_without_summary_evaluations_and_other_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, layers=1, experts=256)
    (run / "summary.json").write_text('{"eval_lo')
    (run / "config.yaml").unlink()
    (run / "environment.json").unlink()
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if '"eval"' not in line]
    (run / "metrics.jsonl").write_text("".join(lines) + lines[0][:30])
    page, names = report(run)
    assert names == MOE
    assert "not finished" in page.text and "unreadable lines in metrics.jsonl: 1" in page.text
    assert "Held-out" not in page.text and "1.5 s" in page.text
    assert "1 MoE layer × 256 experts" in page.text


def test_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page, names = report(tmp_path)
    assert names == set() and "has not finished a training step" in page.text


def test_run_of_one_step_and_missing_numbers(tmp_path: Path) -> None:
    layers = {"0": {"load": [0.5, 0.5]}, "1": {"load": [None, None], "max_violation": None, "losses": None}, "2": {}}
    run = make_run(tmp_path / "run", steps=1, loss=None, mfu=0.5, layers=0)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) | {"layers": layers}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    page, names = report(run)
    assert names == MOE - {"loss.png"}
    assert "50.0%" in page.text and "3 MoE layers × 2 experts" in page.text


def test_big_model(tmp_path: Path) -> None:
    page, names = report(make_run(tmp_path / "run", steps=6, layers=60, experts=64))
    assert names == MOE and len(page.tags("svg")) == 60
    assert (tmp_path / "run" / "report.html").stat().st_size < 8e6


def test_long_run_is_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20_000, layers=1, mfu=0.4)
    page, names = report(run)
    assert names == MOE and "20,000 steps" in page.text and "40.0%" in page.text
    assert (run / "report.html").stat().st_size < 4e6


def test_a_report_is_written_again_and_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=0, steps=4)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pictures_follow_the_data(tmp_path: Path) -> None:
    """Balanced experts are pale; skewed ones are blue and orange. The other pictures change with their numbers too."""

    def draw(name: str, **options: Any) -> dict[str, np.ndarray]:
        pictures = draw_pictures(read_metrics(make_run(tmp_path / name, **options)))
        return {picture.name: imread(io.BytesIO(picture.light))[..., :3] for picture in pictures}

    even, skewed = draw("even", skew=0.0), draw("skewed", skew=1.5, lr=1e-3, loss=1.0, tokens_per_second=7.0)
    for name, pixels in even.items():
        assert np.abs(pixels - skewed[name]).mean() > 1e-3, name

    def saturated(pixels: np.ndarray) -> float:
        left_of_scale = pixels[:, : int(pixels.shape[1] * 0.88)]
        return float((np.ptp(left_of_scale, axis=2) > 0.5).mean())

    assert saturated(even["expert_load"]) < 0.005
    assert saturated(skewed["expert_load"]) > 0.03


# --- the arithmetic behind the pictures


def test_thin_keeps_means_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_003)
    values[77_777] = 50.0
    values[5] = np.nan
    curve = thin(np.arange(100_003.0), values)
    assert len(curve.mean) == MAX_COLUMNS and np.isfinite(curve.mean).all()
    assert curve.high.max() == 50.0 and curve.low.min() == np.nanmin(values)
    assert curve.last == values[-1]
    assert curve.steps[0] < 100 and curve.steps[-1] > 99_900 and (np.diff(curve.steps) > 0).all()
    short = thin(np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 7.0]))
    assert short.steps.tolist() == [1, 3] and short.mean.tolist() == [5, 7]


def test_load_columns() -> None:
    load_nE = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    assert load_columns(np.array([1.0, 2.0, 3.0]), load_nE).tolist() == load_nE.tolist()
    assert load_columns(np.array([7.0]), load_nE[:1]).tolist() == [[0, 1]]
    # Steps 0 and 1 share a span, nothing falls into the second one, which therefore repeats the first.
    assert load_columns(np.array([0.0, 1.0, 10.0]), load_nE).tolist() == [[0.25, 0.75], [0.25, 0.75], [1, 0]]
    many = load_columns(np.arange(5000.0), np.tile([0.25, 0.75], (5000, 1)), limit=100)
    assert many.shape == (100, 2) and many == pytest.approx(np.tile([0.25, 0.75], (100, 1)))


def test_smoothing_keeps_a_line_and_its_start() -> None:
    assert smoothed(np.arange(10.0)).tolist() == list(range(10))  # too short to smooth
    line = smoothed(np.arange(1000.0))
    assert line[:980] == pytest.approx(np.arange(980.0))
    assert line[-1] == pytest.approx(np.arange(979.0, 1000.0).mean())
    assert smoothed(np.full(1000, 3.0)) == pytest.approx(np.full(1000, 3.0))
