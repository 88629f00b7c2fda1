"""Loads a model and decodes with it; as a program, in a process of its own that prints how much memory that took.

``python -m benchmarks.quantized_decode_worker FOLDER DEVICE`` prints ``weights_mb``, and ``peak_mb``: on CPU the peak of the
process (Linux's ``VmHWM``) above what it had before the model, on a GPU that of torch's allocator.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe.models  # noqa: F401  (registers our architecture)
from moe.quant.load import is_quantized
from moe.quant.runtime import load_quantized
from moe.quantized_module import QuantizedModule


def load(folder: Path, device: str) -> Any:
    """The model of a folder in bf16, its matrices packed where they are stored so."""
    if is_quantized(folder):
        return load_quantized(folder, device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval()


@torch.inference_mode()
def decode(model: Any, ids_BL: Tensor, steps: int) -> Tensor:
    """The most likely token ``steps`` times, each after all before it: (B, L + steps)."""
    cache, inputs = None, ids_BL
    for _ in range(steps):
        out = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, inputs = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids_BL = torch.cat((ids_BL, inputs), 1)
    return ids_BL


def weight_bytes(model: Any) -> int:
    """Of all weights, tied ones once."""
    packed = sum(module.num_bytes for module in model.modules() if isinstance(module, QuantizedModule))
    return packed + sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def main(folder: str, device: str) -> None:
    """Print one JSON object."""
    before = _status_bytes("VmRSS")
    model = load(Path(folder), device)
    decode(model, torch.tensor([[2, 3, 4]], device=device), 4)
    if device == "cuda":
        peak: int | None = torch.cuda.max_memory_allocated()
    else:
        highest = _status_bytes("VmHWM")
        peak = None if before is None or highest is None else highest - before
    found = {"weights_mb": weight_bytes(model) / 1e6}
    print(json.dumps(found if peak is None else found | {"peak_mb": peak / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
