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
from benchmarks.kernel_resources import VARIANTS, examine, examine_quantized, examine_router
rows = [examine(name, "many") for name in VARIANTS] + examine_router("deepseek")
for name in ("w4a16 asymmetric", "fp8 blocks"):
    rows += examine_quantized(name, "many")
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_large_blocks_use_hoppers_tensor_cores(rows: list[dict]) -> None:
    gemms = [row for row in rows if not row["kernel"].startswith("route")]
    assert len(gemms) == 6 + 4
    assert all(row["hgmma"] > 0 and row["hmma"] == 0 for row in gemms)


def test_the_router_leaves_registers_to_other_programs(rows: list[dict]) -> None:
    """At most 128 per thread: four programs of four warps share a multiprocessor."""
    routers = [row for row in rows if row["kernel"].startswith("route")]
    assert len(routers) == 2
    assert all(row["registers"] <= 128 for row in routers)


def test_nothing_spills(rows: list[dict]) -> None:
    assert {row["kernel"]: (row["stack_bytes"], row["local_loads"]) for row in rows} == {
        row["kernel"]: (0, 0) for row in rows
    }


def test_programs_fit_the_shared_memory(rows: list[dict]) -> None:
    assert all(row["shared_kib"] <= 227 for row in rows)
    assert max(row["shared_kib"] for row in rows) > 0
