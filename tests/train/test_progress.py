"""What people read while a run runs: short numbers, a bar on a terminal, a few plain lines in a log."""

import io

import pytest

from moe.train.formats import compact, duration
from moe.train.progress import TrainProgress


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0003, "3e-4"), (-0.00025, "-2.5e-4"), (0.25, "0.25"), (12.34, "12.3"), (999.4, "999"), (999.9, "1k"),
     (1500, "1.5k"), (999_999, "1M"), (2e6, "2M"), (3.2e9, "3.2B"), (1e12, "1T")],
)  # fmt: skip
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text


def test_durations() -> None:
    texts = [duration(seconds) for seconds in (0.04, 59.96, 173, 3 * 3600 + 299, 2 * 86400 + 4 * 3600)]
    assert texts == ["0.0 s", "1m 00s", "2m 53s", "3h 04m", "2d 4h"]


def test_progress_without_a_terminal_is_a_few_plain_lines() -> None:
    stream = io.StringIO()
    with TrainProgress(200, stream=stream) as progress:
        for step in range(1, 201):
            progress.update(step, 3.0 - step / 100, 15_234.0, 0.934)
            if step == 50:
                progress.message("held-out loss [1.5]")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 10 + 1  # the first step, every tenth, and the message
    assert lines[0].startswith("step 1/200  loss 2.990  15.2k tok/s  balance 0.93  ") and lines[0].endswith(" left")
    assert lines[-1] == "step 200/200  loss 1.000  15.2k tok/s  balance 0.93"
    assert "held-out loss [1.5]" in lines
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_progress_of_a_resumed_dense_run_and_of_other_ranks() -> None:
    stream = io.StringIO()
    with TrainProgress(100, stream=stream, start_step=90) as progress:
        progress.update(91, None)
        progress.update(100, 2.0)
    assert [line.split("  ")[:2] for line in stream.getvalue().splitlines()] == [
        ["step 91/100", "loss –"],
        ["step 100/100", "loss 2.000"],
    ]
    silent = io.StringIO()
    with TrainProgress(3, enabled=False, stream=silent) as progress:
        progress.update(3, 1.0)
        progress.message("text")
    assert silent.getvalue() == ""
    with pytest.raises(ValueError, match="total_steps=0 must be at least 1"):
        TrainProgress(0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with TrainProgress(4, stream=stream) as progress:
        progress.update(1, 2.5, 1000.0, 1.0)
        progress.message("a [message]")
        progress.update(4, 2.25, 1000.0, 1.0)
    assert "a [message]" in stream.getvalue()
    assert "4/4" in stream.getvalue() and "loss 2.250  1k tok/s  balance 1.00" in stream.getvalue()
