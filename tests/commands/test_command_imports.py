"""`moe --help` stays fast: making the command imports nothing heavy."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "numpy", "deepspeed", "datasets", "lm_eval", "matplotlib", "pydantic")


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, moe.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
