"""docs/scaling-laws.md says what the code does: constants, ranges and both tables."""

import re
from pathlib import Path

import pytest

from moe.commands.amounts import parse_amount
from moe.scaling.laws import LAWS
from moe.scaling.laws.optimum import compute_optimal

DOC = (Path(__file__).resolve().parents[3] / "docs" / "scaling-laws.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(after: str) -> list[list[str]]:
    """Rows of the first table behind a text, without its heading."""
    lines = DOC[DOC.index(after) :].splitlines()
    rows = [cells(line) for line in lines if line.startswith("|") or not line]
    end = rows.index([""]) if [""] in rows else len(rows)
    return rows[:end]


def region(name: str) -> list[dict[str, str]]:
    text = re.search(rf"<!-- laws: {name} -->\n(.*?)<!-- end -->", DOC, re.DOTALL)
    assert text is not None
    head, _, *rows = map(cells, text[1].splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def number(text: str) -> float:
    return parse_amount("cell", text)


def test_constants() -> None:
    head, _, *rows = table("| Constant |")
    names = [name.strip("`") for name in head[1:]]
    assert set(names) == set(LAWS)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for constant, *values in rows:
        for name, value in zip(names, values, strict=True):
            if value:
                found[name][constant] = float(value)
    assert found == {name: dict(law.constants) for name, law in LAWS.items()}


def test_ranges() -> None:
    head, _, *rows = table("| Fitted on |")
    lines = {row[0]: dict(zip([name.strip("`") for name in head[1:]], row[1:], strict=True)) for row in rows}
    for name, law in LAWS.items():
        for key, column in (("active parameters", "active"), ("tokens", "tokens")):
            limits = law.fitted[column] if column in law.fitted else law.fitted["active_blocks"]
            low, high = re.fullmatch(r"(\S+) to (\S+)(?: without embeddings)?", lines[key][name]).groups()  # type: ignore[union-attr]
            assert (number(low), number(high)) == pytest.approx((limits.low, limits.high), rel=0.02)


def test_fine_grained_table() -> None:
    rows = region("fine-grained")
    assert len(rows) == 7
    for row in rows:
        best = compute_optimal(LAWS["fine-grained"], number(row["FLOPs"]), 50257)[0]
        assert number(row["N active"]) == pytest.approx(best.size.active_blocks, rel=6e-3)
        assert number(row["D"]) == pytest.approx(best.tokens, rel=6e-3)
        assert float(row["G"]) == best.size.granularity
        assert float(row["loss"]) == pytest.approx(best.loss, abs=6e-4)


def test_joint_table() -> None:
    rows = region("joint")
    assert len(rows) == 9
    for row in rows:
        optima = compute_optimal(LAWS["joint"], number(row["FLOPs"]), 50257)
        best = {optimum.size.expansion: optimum for optimum in optima}[float(row["E"])]
        assert number(row["N active"]) == pytest.approx(best.size.active, rel=6e-3)
        assert number(row["D"]) == pytest.approx(best.tokens, rel=6e-3)
        assert float(row["loss"]) == pytest.approx(best.loss, abs=6e-4)
