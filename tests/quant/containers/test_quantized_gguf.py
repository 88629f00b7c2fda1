"""GGUF files hold the chosen codes and scales bit by bit, and llama.cpp computes with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant.containers.quantized_folders import scheme_of, source_folder, target_of, write_quantized

from moe.models.folder import ModelFolder
from moe.models.gguf.architectures import choose_architecture
from moe.models.gguf.source import GGUFSource
from moe.models.gguf.tensors import plan_tensors
from moe.models.gguf.verify import compare_with_llama_cpp
from moe.quant.containers import CONTAINERS
from moe.quant.containers.gguf import BLOCK
from moe.quant.load import load_simulated
from moe.quant.verify_gguf import LlamaRows, load_as_llama_cpp, verify_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed")
GGUF = CONTAINERS["gguf"]
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "glm4_moe": {"partial_rotary_factor": 1.0},
    "qwen2_moe": {"norm_topk_prob": False, "mlp_only_layers": []},
}


def made(kind: str, scheme: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A quantised folder and its file ``.gguf`` beside it."""
    source = source_folder(kind, tmp_path / kind, **KINDS[kind])
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of(scheme, BLOCK), "gguf", dtype)
    GGUF.finish(tmp_path / "out", tmp_path / "out.gguf")
    return tmp_path / "out"


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_codes_and_scales(kind: str, scheme: str, tmp_path: Path) -> None:
    """Read by the package gguf, each matrix is codes times scales to the last bit; the rest is fp32 or fp16."""
    import gguf

    folder = made(kind, scheme, tmp_path, torch.bfloat16)
    load_simulated(folder).save_pretrained(tmp_path / "plain")
    plain = GGUFSource(ModelFolder(tmp_path / "plain"))
    expected = {tensor.name: tensor for tensor in plan_tensors(plain, choose_architecture(plain))}
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    quantized = gguf.GGMLQuantizationType["Q8_0" if scheme == "w8a16" else "Q4_0"]
    kinds = set()
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        wanted = expected[tensor.name].read().float()
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            assert tensor.name in ("token_embd.weight", "output.weight")
            wanted = wanted.half().float()
        elif tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            assert "norm" in tensor.name or "bias" in tensor.name or "gate_inp" in tensor.name
        assert np.array_equal(values, wanted.numpy().reshape(-1)), tensor.name
        kinds.add(tensor.tensor_type)
    assert kinds == {quantized, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32}
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{quantized.name}"]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("mixtral", "w8a16"), ("mixtral", "w4a16"), ("qwen3_moe", "w4a16"), ("glm4_moe", "w8a16"), ("qwen2_moe", "w4a16")],
)
def test_llama_cpp_computes_with_them(kind: str, scheme: str, tmp_path: Path) -> None:
    """On single tokens, where hardly a value is near enough to the middle of two codes to flip, to 2e-4; then on text."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = made(kind, scheme, tmp_path)
    single = torch.arange(2, 10)[:, None]
    found = compare_with_llama_cpp(load_as_llama_cpp(folder), tmp_path / "out.gguf", single)
    assert found.max_diff < 2e-4 * found.reference_rms
    exact = compare_with_llama_cpp(load_simulated(folder), tmp_path / "out.gguf", single)
    assert exact.max_diff > 1e-2 * found.reference_rms, (
        "llama.cpp rounds rows; without that the comparison above says nothing"
    )
    windows_BL = torch.randint(2, 48, (2, 100))
    assert verify_gguf(folder, tmp_path / "out.gguf", windows_BL).same_top1 >= 0.97


def test_a_changed_code_is_found(tmp_path: Path) -> None:
    folder = made("mixtral", "w4a16", tmp_path)
    path = tmp_path / "out.gguf"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in the last tensor
    path.write_bytes(data)
    with pytest.raises(ValueError, match="differs from the source's"):
        verify_gguf(folder, path, torch.tensor([[2, 3]]))


def test_rows_by_hand() -> None:
    row = torch.zeros(1, 32)
    row[0, :3] = torch.tensor([127.0, -1.4, 0.6])
    assert LlamaRows().simulate(row)[0, :3].tolist() == [127.0, -1.0, 1.0]
    assert LlamaRows().simulate(torch.zeros(2, 64)).tolist() == torch.zeros(2, 64).tolist()


def test_refusals(tmp_path: Path) -> None:
    source = source_folder("mixtral", tmp_path / "source")
    for scheme, group, to, expected in (
        ("w4a16", 64, "mixtral", "--group-size 32"),
        ("w8a8", None, "mixtral", "use one of w8a16, w4a16"),
        ("w8a16", 32, "olmoe", "llama.cpp; use one of mixtral, qwen3_moe, glm4_moe, qwen2_moe"),
    ):
        with pytest.raises(ValueError, match=expected):
            GGUF.check(target_of(source, scheme_of(scheme, group), to))
