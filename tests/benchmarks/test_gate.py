"""The gate: green on equal results, red on any wrong tensor, and nothing is timed behind a red one."""

import dataclasses

import pytest
import torch

from benchmarks import cpu_train, record, run, verify
from benchmarks.registry import BENCHMARKS
from benchmarks.spec import Benchmark, Check, Options, Row


def made(checks: list[Check]) -> Benchmark:
    def never(options: Options) -> list[Row]:
        raise AssertionError("measured behind a red gate")

    return Benchmark(name="made", description="", columns=(), table=(), gate=lambda options: checks, run=never)


def test_equal_results_pass_and_others_do_not() -> None:
    right = torch.randn(100)
    for wrong, passes in (
        (right, True),
        (right * (1 + 1e-7), True),
        (right * 1.001, False),
        (right[:50], False),
        (torch.where(torch.arange(100) == 3, float("nan"), right), False),
    ):
        (check,) = verify.compare("x", {"y": wrong}, {"y": right}, torch.float32)
        assert check.passed == passes, check


def test_an_expected_zero_must_be_zero() -> None:
    (check,) = verify.compare("x", {"y": torch.ones(3)}, {"y": torch.zeros(3)}, torch.float32)
    assert not check.passed


def test_red_gate_measures_nothing() -> None:
    checks = [Check(name="good", error=0.0, limit=0.1), Check(name="bad one", error=float("nan"), limit=0.1)]
    result = run.execute(made(checks), Options())
    assert result["gate"] == "red"
    assert result["rows"] == []
    assert "bad one" in str(result["reason"])
    assert "good" not in str(result["reason"])


def test_empty_gate_is_red() -> None:
    with pytest.raises(verify.RedGate, match="checked nothing"):
        verify.verify(made([]), Options())


def test_red_gate_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = dataclasses.replace(made([Check(name="bad one", error=1.0, limit=0.1)]), name="cpu-train")
    monkeypatch.setitem(BENCHMARKS, "cpu-train", lambda: benchmark)
    assert run.main(["cpu-train"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bad one" in captured.err


def test_quick_gate_of_cpu_train_is_green_and_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(quick=True)
    assert all(check.passed for check in cpu_train.gate(options))
    step = cpu_train._step

    def wrong(module: torch.nn.Module, block: cpu_train.Block) -> dict[str, torch.Tensor]:
        found = step(module, block)
        if module is block.ours:
            found["d experts.down_proj"] = found["d experts.down_proj"] * 1.05
        return found

    monkeypatch.setattr(cpu_train, "_step", wrong)
    bad = {check.name.split(": ")[1] for check in cpu_train.gate(options) if not check.passed}
    assert bad == {"d experts.down_proj"}


def test_measured_rows_fit_the_csv() -> None:
    header = {*record.ENVIRONMENT, *cpu_train.BENCHMARK.columns}
    rows = cpu_train.run(Options(quick=True, repeats=1))
    assert all(row.keys() <= header for row in rows)
    speedups = {row["implementation"]: row["speedup"] for row in rows if row["part"] == "block"}
    assert speedups[cpu_train.OURS]
    assert speedups["transformers eager"] is None


def test_what_does_not_fit_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_train, "_free_bytes", lambda: 8 * 2**30)
    reason = cpu_train.skip_reason(cpu_train.SHAPES[0], "bf16", "batched_mm")
    assert reason is not None
    assert "96 GiB" in reason
    assert cpu_train.skip_reason(cpu_train.SHAPES[0], "bf16", "grouped_mm") is None
    assert cpu_train.skip_reason(cpu_train.QUICK_SHAPES[0], "bf16", "batched_mm") is None


def test_tokens_choose_clearly() -> None:
    shape = cpu_train.SHAPES[0]
    block = cpu_train.make_block(dataclasses.replace(shape, num_tokens=256), "bf16")
    logits_TE = block.x_BLD[0].float() @ block.ours.router.weight.float().T
    best_Tk = logits_TE.topk(shape.top_k + 1).values
    assert (best_Tk[:, -2] - best_Tk[:, -1]).min() > 2**-8 * logits_TE.abs().max()
