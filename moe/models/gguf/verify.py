"""Compares a GGUF file with the model it was written from: what is in it, and what llama.cpp computes from it.

Legend: B windows, L window length.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.models.compare import LogitComparison, LogitsFile, compare_logits, model_logits
from moe.models.folder import ModelFolder
from moe.models.gguf.architectures import choose_architecture
from moe.models.gguf.metadata import hyperparameters
from moe.models.gguf.package import load_gguf
from moe.models.gguf.source import GGUFSource
from moe.models.gguf.tensors import plan_tensors
from moe.models.gguf.vocabulary import read_vocabulary
from moe.models.gguf.write import FILE_TYPES, Storage

# Started by its path: importing it needs llama-cpp-python.
_LLAMA_PROCESS = Path(__file__).with_name("llama_process.py")


def check_contents(source: Path, path: Path, dtype: str) -> int:
    """Read a file back and compare every tensor and key with those that the source gives; returns the number of tensors.

    Raises:
        ValueError: something differs or is not there; names it.
    """
    return check_file(GGUFSource(ModelFolder(source)), path, FILE_TYPES[dtype])


def check_file(model: GGUFSource, path: Path, storage: Storage) -> int:
    """`check_contents` of a model that is open, its tensors stored in any way."""
    gguf = load_gguf()
    architecture = choose_architecture(model)
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    expected: dict[str, Any] = {"general.architecture": architecture.name}
    for key, value in hyperparameters(model, architecture).items():
        expected[f"{architecture.name}.{key}"] = float(np.float32(value)) if isinstance(value, float) else value
    if keys.get("tokenizer.ggml.model") != "no_vocab":
        vocabulary = read_vocabulary(model)
        assert vocabulary is not None
        expected["tokenizer.ggml.pre"] = vocabulary.pre_tokenizer
        expected["tokenizer.ggml.tokens"] = vocabulary.tokens
        expected["tokenizer.ggml.merges"] = vocabulary.merges
    for key, value in expected.items():
        if keys.get(key) != value:
            raise ValueError(f"{path}: {key} is {_short(keys.get(key))} instead of {_short(value)}")
    found = {tensor.name: tensor for tensor in reader.tensors}
    plan = plan_tensors(model, architecture)
    if differ := sorted({tensor.name for tensor in plan} ^ set(found)):
        raise ValueError(f"{path}: these tensors are in one of file and source only: {', '.join(differ)}")
    for tensor in plan:
        kind = storage.kind(tensor)
        stored = found[tensor.name]
        shape = tuple(int(size) for size in reversed(stored.shape))
        if shape != tensor.shape or stored.tensor_type != kind:
            raise ValueError(
                f"{path}: {tensor.name} is {stored.tensor_type.name} {shape}, not {kind.name} {tensor.shape}"
            )
        values = storage.encode(tensor)
        if not np.array_equal(np.asarray(stored.data).reshape(-1).view(np.uint8), values.reshape(-1).view(np.uint8)):
            raise ValueError(f"{path}: {tensor.name} differs from the source's")
    return len(plan)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def compare_with_llama_cpp(
    model: nn.Module, path: Path, windows_BL: Tensor, threads: int | None = None
) -> LogitComparison:
    """Logits of a transformers model, the reference, and of its file in llama.cpp on CPU.

    Args:
        model: in eval mode.
        path: the GGUF file.
        windows_BL: token ids.
        threads: CPU threads of llama.cpp; by default as many as torch uses.

    Raises:
        ValueError: ``llama_cpp`` is not installed, or it fails on the file; says how.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            "running a GGUF file needs the package llama-cpp-python: pip install 'moe-framework[llama-cpp]' (it compiles "
            "llama.cpp, which takes a C++ compiler and several minutes)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        windows_file, found = Path(scratch) / "windows.npy", LogitsFile(Path(scratch) / "logits", len(windows_BL))
        np.save(windows_file, windows_BL.numpy().astype(np.int32))
        # -P: the script's own folder stays out of sys.path.
        arguments = [str(path.absolute()), str(windows_file), str(found.path), str(threads or torch.get_num_threads())]
        command = [sys.executable, "-P", str(_LLAMA_PROCESS), *arguments]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"llama.cpp ends with status {done.returncode} on {path}: {done.stderr.strip()[-2000:]}")
        return compare_logits(model_logits(model, windows_BL), found.windows(windows_BL.shape[1]), windows_BL)
