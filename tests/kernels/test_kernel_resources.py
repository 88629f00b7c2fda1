"""What the compiler makes of the kernels for Hopper, checked where there is no GPU; in a process that does not interpret them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
from benchmarks.kernel_resources import VARIANTS, examine
print(json.dumps([examine(name, "many") for name in VARIANTS]))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_large_blocks_use_hoppers_tensor_cores(rows: list[dict]) -> None:
    assert len(rows) == 6
    assert all(row["hgmma"] > 0 and row["hmma"] == 0 for row in rows)


def test_nothing_spills(rows: list[dict]) -> None:
    assert {row["kernel"]: (row["stack_bytes"], row["local_loads"]) for row in rows} == {
        row["kernel"]: (0, 0) for row in rows
    }


def test_programs_fit_the_shared_memory(rows: list[dict]) -> None:
    assert all(0 < row["shared_kib"] <= 227 for row in rows)
