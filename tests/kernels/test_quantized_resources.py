"""What the compiler makes of the quantised kernels for Hopper; in a process that does not interpret them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
from benchmarks.kernel_resources import examine_quantized
print(json.dumps([row for name in ("w4a16 asymmetric", "fp8 blocks") for row in examine_quantized(name, "many")]))
"""


def test_hoppers_tensor_cores_and_no_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["kernel"] for row in rows] == [
        "up w4a16 asymmetric", "down w4a16 asymmetric", "up fp8 blocks", "down fp8 blocks",
    ]  # fmt: skip
    for row in rows:
        assert row["hgmma"] > 0, row
        assert row["hmma"] == 0, row
        assert (row["stack_bytes"], row["local_loads"]) == (0, 0), row
        assert 0 < row["shared_kib"] <= 227, row
