"""The README's Python examples run as they stand there, one after the other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_readme_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() < 1.5  # type: ignore[attr-defined]
    assert names["layer"].stats.counts_E.sum() == 4 * 64 * 2  # type: ignore[attr-defined]
    assert names["model"].num_parameters() > 0  # type: ignore[attr-defined]
