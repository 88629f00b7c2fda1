"""Tables that fit a terminal, and pictures: what they show."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from moe.scaling.coordinates import ACTIVATION, UPDATE, Verdict
from moe.train.mup.check import CheckOptions, CheckResult
from moe.train.mup.render import draw_check, draw_sweeps, render_check, render_sweep
from moe.train.mup.sweep import SweepRun

WIDTHS = (64, 128, 256, 512)
MODULES = ("embed_tokens", "post_attention_layernorm", "mlp.shared_experts.gate_up_proj", "mlp.router", "lm_head")


def result(slope: float, name: str = "mup") -> CheckResult:
    """Sizes that grow as width ** slope, of modules of which the last two are outputs."""
    verdicts = [
        Verdict(
            module=module,
            quantity=quantity,
            step=step,
            sizes={width: (index + 1) * 0.1 * (width / 64) ** slope for width in WIDTHS},
            judged=quantity == UPDATE or index < 3,
        )
        for step in (0, 1, 2, 4)
        for index, module in enumerate(MODULES)
        for quantity in (ACTIVATION, UPDATE)[: 1 + bool(step)]
    ]
    options = CheckOptions(axis="width", values=WIDTHS, num_steps=4)
    return CheckResult(options=options, parametrization=name, runs={}, verdicts=verdicts)


def text_of(slope: float) -> str:
    out = io.StringIO()
    render_check(result(slope), Console(file=out, width=80))
    return out.getvalue()


def test_a_check_that_passes() -> None:
    text = text_of(0.01)
    assert "pass: nothing changes by more than 20% over width 64 to 512" in text
    assert "activation after 4 steps, mup parametrization, by width" in text
    assert "FAIL" not in text and "step 1" not in text
    rows = [line.split() for line in text.splitlines() if "mlp.router" in line]
    assert rows[0] == ["mlp.router", "0.4", "0.403", "0.406", "0.408", "2%", "-"]
    assert rows[1][-1] == "ok"
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_a_check_that_fails() -> None:
    text = text_of(1.0)
    flat = " ".join(text.split())
    assert "fail: 5 kinds of modules change by more than 20%: embed_tokens, lm_head, mlp.router" in flat
    assert text.count("FAIL") == 8, "3 activations and 5 updates"
    assert "…" not in text


def test_failures_before_the_last_step_are_listed_once_and_not_without_end() -> None:
    found = result(0.0)
    early = [
        Verdict(module=f"m{index}", quantity=UPDATE, step=1, sizes={64: 1.0, 512: 2.0}, judged=True)
        for index in range(10)
    ]
    out = io.StringIO()
    changed = CheckResult(options=found.options, parametrization="mup", runs={}, verdicts=[*found.verdicts, *early])
    render_check(changed, Console(file=out, width=80))
    assert "step 1: update of m0 changes by 100%" in out.getvalue()
    assert out.getvalue().count("step 1:") == 8 and "... and 2 more before step 4" in out.getvalue()


def sweep(value: int, best: float, seeds: int = 2) -> list[SweepRun]:
    rates = [1e-3 * 2**power for power in range(6)]
    return [
        SweepRun(value=value, lr=lr, seed=seed, eval_loss=2.0 + 0.01 * seed + 0.1 * math.log(lr / best) ** 2)
        for lr in rates
        for seed in range(seeds)
    ]


def test_a_sweep_as_a_table() -> None:
    diverged = [SweepRun(value=128, lr=1.0, seed=seed, eval_loss=math.nan) for seed in (0, 1)]
    runs = [*sweep(64, 4e-3), *sweep(128, 8e-3), *diverged]
    out = io.StringIO()
    render_sweep(runs, "width", Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["0.004", "2.0050", "2.0530"] in lines
    assert ["1", "diverged"] in lines
    assert ["64", "4.00e-03", "4.00e-03", "4.00e-03", "2.0050"] in lines
    assert "moves by a factor of 2.00 over width 64 to 128" in out.getvalue()
    assert "…" not in out.getvalue()


def test_one_seed_claims_no_uncertainty_and_an_edge_is_named() -> None:
    out = io.StringIO()
    render_sweep(sweep(64, 1.0, seeds=1), "width", Console(file=out, width=80))
    assert [
        "64",
        "3.20e-02",
        f"{2 + 0.1 * math.log(0.032) ** 2:.4f}",
        "at",
        "the",
        "edge:",
        "try",
        "more",
        "rates",
    ] in [line.split() for line in out.getvalue().splitlines()]
    assert "one seed says nothing about the uncertainty: use --seeds" in out.getvalue()
    assert "moves by" not in out.getvalue()


def colors(path: Path) -> set[int]:
    """As 0xRRGGBB."""
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64)
    return set(np.unique(pixels @ np.array([1 << 16, 1 << 8, 1])).tolist())


def test_pictures_show_their_lines(tmp_path: Path) -> None:
    check, swept = tmp_path / "new" / "check.png", tmp_path / "sweep.png"
    draw_check([result(0.01), result(1.0, "standard")], check)
    assert colors(check) >= {0x2557D6, 0xD9480F, 0xE8A400}
    draw_sweeps({"mup": [*sweep(64, 4e-3), *sweep(128, 8e-3)], "standard": sweep(64, 1e-2)}, "width", swept)
    assert colors(swept) >= {0x9EC5F4, 0x0B1F57}
    assert imread(swept).shape[1] == pytest.approx(2 * 6.2 * 160, abs=4)


def test_a_sweep_where_a_rate_diverged_is_drawn(tmp_path: Path) -> None:
    runs = [
        run if run.lr < 3e-2 else SweepRun(value=64, lr=run.lr, seed=run.seed, eval_loss=math.nan)
        for run in sweep(64, 4e-3)
    ]
    draw_sweeps({"mup": runs}, "width", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
