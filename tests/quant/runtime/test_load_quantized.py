"""Quantised folders that run packed: their logits are the simulated ones', and the model is never there in full."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.close import assert_close
from helpers.quantized_case import DEVICE, small_quantized_blocks
from quant.containers.quantized_folders import scheme_of, source_folder, write_quantized
from torch import Tensor

from moe.kernels.quantized import dequantize
from moe.models.folder import ModelFolder
from moe.quant.grids import IntGrid
from moe.quant.load import load_simulated
from moe.quant.runtime import QuantizedLinear, load_quantized
from moe.quant.runtime.open import open_quantized
from moe.quant.runtime.pack import is_packable, kernel_scheme, pack
from moe.quant.schemes import COMPRESSED_TENSORS, SCHEMES, SIMULATED
from moe.quantized_experts import QuantizedExpertBank
from moe.quantized_module import QuantizedModule

IDS_BL = torch.randint(2, 48, (2, 16), generator=torch.Generator().manual_seed(3))
PACKED = {"w8a16": 8, "w4a16": 4, "w3a16": 4, "mxfp4": 8}
FOLDERS = [
    ("glm4_moe", "w8a16", COMPRESSED_TENSORS),
    ("glm4_moe", "w4a16", COMPRESSED_TENSORS),
    ("mixtral", "w3a16", COMPRESSED_TENSORS),
    ("qwen2_moe", "w4a16", SIMULATED),
    ("qwen3_moe", "mxfp4", COMPRESSED_TENSORS),
]


def make_folder(path: Path, kind: str, scheme: str, container: str, **values: Any) -> Path:
    group_size = 32 if scheme in ("w4a16", "w3a16", "w4a8") else None
    source = source_folder(kind, path / "source", **values)
    write_quantized(source, path, path / "out", scheme_of(scheme, group_size), container, torch.bfloat16)
    return path / "out"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS_BL).logits


@pytest.mark.parametrize(("kind", "scheme", "container"), FOLDERS)
def test_logits(kind: str, scheme: str, container: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, kind, scheme, container)
    expected = logits(load_simulated(folder))
    assert_close("fp32", logits(load_quantized(folder, dtype=torch.float32)), expected, torch.float32)
    model = load_quantized(folder)
    got = logits(model).float()
    assert got.isfinite().all()
    assert (got - expected).square().mean() < 0.06**2 * expected.square().mean()  # two layers in bf16
    parameters = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(parameters.values()) == {torch.bfloat16}
    assert not any(name.endswith(("_proj.weight", "gate_up_proj", "down_proj")) for name in parameters)
    assert not model.training
    assert model.generate(IDS_BL[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)


def test_on_the_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, "mixtral", "w4a16", COMPRESSED_TENSORS)
    ids_BL = IDS_BL[:1, :3]
    with torch.no_grad():
        expected = load_simulated(folder)(ids_BL).logits
    monkeypatch.setenv("MOE_KERNELS", "triton")
    small_quantized_blocks(monkeypatch, n=64, k=64)
    model = load_quantized(folder, DEVICE, torch.float32)
    assert not any(module._repacked for module in model.modules() if isinstance(module, QuantizedModule))
    with torch.no_grad():
        assert_close("triton", model(ids_BL.to(DEVICE)).logits.cpu(), expected, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_held(tied: bool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "glm4_moe", "w4a16", COMPRESSED_TENSORS, tie_word_embeddings=tied)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    model = load_quantized(folder)
    assert model.generation_config.eos_token_id == 7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert kinds["model.layers.1.mlp.experts"] is QuantizedExpertBank
    assert kinds["model.layers.0.self_attn.q_proj"] is QuantizedLinear
    assert model.model.layers[1].mlp.router.bias_E.dtype == torch.float32
    packed = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    assert all(module.weight(name).scheme == "w4a16" for module in packed for name in module._forms)
    assert any(module._repacked for module in packed), "laid out for the device already"


@pytest.mark.parametrize("name", SCHEMES)
def test_packing_is_exact(name: str) -> None:
    grid = scheme_of(name, 32 if name in ("w4a16", "w3a16") else None).weights
    assert is_packable(SCHEMES[name]) == (name in PACKED)
    if name not in PACKED:
        return
    assert kernel_scheme(grid) == f"w{PACKED[name]}a16"
    weights = [torch.randn(6, 64), torch.randn(3, 6, 64)]
    for weight in weights:
        rounded = grid.nearest(weight, torch.float32)
        values = dequantize(pack(rounded), torch.float32)
        assert torch.equal(values if weight.dim() == 3 else values[0], rounded.dequantize())


def test_packing_with_zero_points_and_narrow_scales() -> None:
    for bits, stored in ((4, torch.bfloat16), (3, torch.float16), (8, torch.float32)):
        rounded = IntGrid(bits=bits, symmetric=False, group_size=32).nearest(torch.randn(2, 5, 64) + 0.3, stored)
        packed = pack(rounded)
        assert packed.zero_point is not None
        assert packed.scale.dtype == stored
        assert torch.equal(dequantize(packed, torch.float32), rounded.dequantize())


def test_folders_that_do_not_run_packed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "mixtral", "w8a8", COMPRESSED_TENSORS)
    with pytest.raises(ValueError, match="quantised to w8a8, which rounds activations; use load_simulated"):
        load_quantized(folder)
    with pytest.raises(ValueError, match="is not quantised; load it with AutoModelForCausalLM"):
        load_quantized(tmp_path / "source")


@pytest.mark.parametrize(
    ("gone", "container"),
    [
        ("model.norm.weight", COMPRESSED_TENSORS),
        ("model.layers.1.input_layernorm.weight", COMPRESSED_TENSORS),
        ("model.layers.1.mlp.router.bias_E", SIMULATED),
    ],
)
def test_a_folder_that_lacks_a_weight(
    gone: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, "glm4_moe", "w8a16", container)
    monkeypatch.setattr(
        ModelFolder, "names", property(lambda self: [name for name in self._files if name != gone]), raising=True
    )
    with pytest.raises(
        ValueError, match=rf"does not fit its config: .*{gone.removeprefix('model.layers.1.')}.* is missing"
    ):
        load_quantized(folder)


def test_opened_as_it_can_run(tmp_path: Path) -> None:
    assert open_quantized("someone/some-model", "cpu") is None
    packed = make_folder(tmp_path / "packed", "mixtral", "w8a16", COMPRESSED_TENSORS)
    assert open_quantized(str(tmp_path / "packed" / "source"), "cpu") is None
    opened = open_quantized(str(packed), "cpu")
    assert opened is not None
    assert "w8a16: packed weights, activations in torch.bfloat16" in opened.note
    simulated = make_folder(tmp_path / "simulated", "mixtral", "w8a8", COMPRESSED_TENSORS)
    (simulated / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    opened = open_quantized(str(simulated), "cpu")
    assert opened is not None
    assert "w8a8: simulated" in opened.note
    assert opened.model.generation_config.eos_token_id == 7
    assert torch.equal(logits(opened.model), logits(load_simulated(simulated)))
    with pytest.raises(ValueError, match="simulated in fp32; leave --dtype out"):
        open_quantized(str(simulated), "cpu", torch.bfloat16)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (packed / "config.json").write_text(json.dumps(config))
    assert open_quantized(str(packed), "cpu") is None, "transformers may know it"


@pytest.mark.slow
def test_memory_is_that_of_packed_weights(tmp_path: Path) -> None:
    """25 million weights: 50 MB in bf16, which no moment of the loading holds; 16 MB in 4 bits with their scales."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    sizes = {"hidden_size": 384, "moe_intermediate_size": 256, "intermediate_size": 256, "n_routed_experts": 8}
    folder = make_folder(tmp_path, "glm4_moe", "w4a16", COMPRESSED_TENSORS, num_hidden_layers=10, **sizes)
    small = make_folder(tmp_path / "small", "glm4_moe", "w4a16", COMPRESSED_TENSORS)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load_worker.py")), str(small), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["packed"] > 25e6, "large enough to be seen"
    assert found["weights"] < 0.32 * 2 * found["packed"]
    assert found["peak"] < 0.75 * 2 * found["packed"], found
