"""Runs a model folder in a process that knows transformers and nothing of us: what a stranger's machine makes of it.

`moe.models.verify` starts this file by its path; it must not import `moe`. Arguments: the model folder, a safetensors file with
``windows`` (B, L), the dtype to load in, the file to write fp32 logits to. Prints one JSON object with what did not load.
Weights that are stored as compressed-tensors are dequantised when they are loaded.

Legend: B windows, L window length.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig


@torch.no_grad()
def main(folder: str, windows_file: str, dtype: str, out: str) -> None:
    """Load in ``dtype``, compute in fp32."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, report = loaded[0].float().eval(), loaded[1]
    with open(out, "wb") as file:
        for ids_L in load_file(windows_file)["windows"]:
            model(input_ids=ids_L[None], use_cache=False).logits[0].numpy().tofile(file)
    assert "moe" not in sys.modules, "this process has to do without us"
    problems = {name: sorted(map(str, found)) for name, found in report.items() if found}
    print(json.dumps({"architecture": type(model).__name__, "problems": problems}))


if __name__ == "__main__":
    main(*sys.argv[1:])
