"""Rows on disk, tables in documents, turns, and the command line."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record, run, tables, timing
from benchmarks.registry import BENCHMARKS
from benchmarks.spec import Benchmark, Check, Options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    benchmark = Benchmark(
        name="made",
        description="",
        columns=("part", "median_ms", "note"),
        table=("part", "median_ms", "note"),
        gate=lambda options: [Check(name="x", error=0.0, limit=0.0)],
        run=lambda options: [{"part": "a", "median_ms": 1.5}, {"part": "b", "median_ms": 2.5}],
    )
    monkeypatch.setitem(BENCHMARKS, "made", lambda: benchmark)
    return benchmark


def rows_of(benchmark: Benchmark) -> list[list[str]]:
    with record.path_of(benchmark).open(newline="") as file:
        return list(csv.reader(file))


def test_rows_are_appended_below_one_header(made: Benchmark) -> None:
    for _ in range(2):
        run.execute(made, Options())
    header, *rows = rows_of(made)
    assert header == [*record.ENVIRONMENT, "part", "median_ms", "note"]
    assert header[:4] == ["date", "commit", "dirty", "device"]
    assert len(rows) == 4
    assert [row[header.index("median_ms")] for row in rows] == ["1.5", "2.5"] * 2
    for name in ("date", "device", "num_threads", "torch", "transformers"):
        assert all(row[header.index(name)] for row in rows), name


def test_quick_runs_are_not_recorded(made: Benchmark) -> None:
    run.execute(made, Options(quick=True))
    assert not record.path_of(made).exists()


def test_other_columns_are_an_error(made: Benchmark) -> None:
    run.execute(made, Options())
    wider = dataclasses.replace(made, columns=(*made.columns, "new"))
    with pytest.raises(ValueError, match=r"made\.csv has other columns"):
        run.execute(wider, Options())
    assert len(rows_of(made)) == 3


def test_table_shows_the_latest_run(made: Benchmark) -> None:
    assert "No run" in tables.markdown(made)
    old, new = ({"date": date, "device": "D", "part": "a", "median_ms": ms} for date, ms in (("d1", 1), ("d2", 2)))
    record.append(made, [old])
    record.append(made, [new, new | {"part": "b", "median_ms": 3}])
    text = tables.markdown(made)
    assert "| a | 2 |" in text
    assert "| b | 3 |" in text
    assert "| a | 1 |" not in text
    assert "note" not in text, "an empty column is not shown"
    assert "d2" in text
    assert "| a |" not in tables.markdown(made, part="b")


def test_marked_regions_are_filled_again_and_again(made: Benchmark, tmp_path: Path) -> None:
    record.append(made, [{"date": "d1", "part": "a", "median_ms": 1}])
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "p.md"
    page.write_text("before\n<!-- table: made part=a -->\nold\n<!-- end -->\nafter\n")
    tables.main()
    first = page.read_text()
    assert "| a | 1 |" in first
    assert "old" not in first
    assert first.startswith("before\n")
    assert first.endswith("after\n")
    tables.main()
    assert page.read_text() == first
    with pytest.raises(ValueError, match="'other' is no benchmark"):
        tables.fill("<!-- table: other -->\n<!-- end -->")


def test_turns_interleave_after_one_round_that_does_not_count() -> None:
    calls: list[str] = []
    times = timing.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "abababab"
    assert len(times["a"].seconds) == 3
    made = timing.Timing(seconds=(0.001, 0.002, 0.003, 0.004, 0.005), waiting=None)
    columns = made.columns()
    assert columns["median_ms"] == 3.0
    assert columns["p20_ms"] == pytest.approx(1.8)
    assert columns["p80_ms"] == pytest.approx(4.2)
    assert columns["repeats"] == 5


@pytest.mark.parametrize("command", [["benchmarks/run.py"], ["-m", "benchmarks.run"]])
def test_list_from_a_file_and_as_a_module(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert "cpu-train" in done.stdout


def test_json_is_one_object_and_nothing_else(made: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = dataclasses.replace(made, gate=lambda options: print("noise") or made.gate(options))
    BENCHMARKS["made"] = lambda: noisy
    assert run.main(["made", "--json", "--quick"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gate"] == "green"
    assert [row["part"] for row in result["rows"]] == ["a", "b"]
    assert result["environment"]["torch"]


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        ([], "give a NAME"),
        (["nothing"], "cpu-train"),
        (["cpu-train", "--repeats", "0"], "repeats=0"),
    ):
        with pytest.raises(SystemExit):
            run.main(argv)
        assert words in capsys.readouterr().err
