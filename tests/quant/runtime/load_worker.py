"""Loads a quantised folder, runs it, and prints how many weights it has and how many bytes that took.

A small folder goes before it: what Python and torch load with their first model is not counted.
"""

import json
import math
import sys
from pathlib import Path

import torch

from moe.models import MoEForCausalLM
from moe.quant.runtime import load_quantized
from moe.quantized_module import QuantizedModule


def status(name: str) -> int:
    """Bytes by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(folder: str) -> MoEForCausalLM:
    model = load_quantized(Path(folder))
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64))
    return model


def main(small: str, folder: str) -> None:
    torch.set_num_threads(1)
    run(small)
    before = status("VmRSS")
    model = run(folder)
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    packed = sum(math.prod(form.shape) for module in modules for form in module._forms.values())
    weights = sum(module.num_bytes for module in modules)
    print(json.dumps({"packed": packed, "weights": weights, "peak": status("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
