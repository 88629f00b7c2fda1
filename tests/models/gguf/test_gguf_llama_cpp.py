"""llama.cpp computes what transformers and we compute, for every kind of model that is written."""

import importlib.util
from pathlib import Path

import pytest
import torch
from models.gguf.gguf_models import MODELS, VOCAB, save

from moe.models.gguf.verify import compare_with_llama_cpp
from moe.models.gguf.write import write_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: extra [llama-cpp]"
)
TOKENS = torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model")
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32")
    assert written.architecture == MODELS[name][0]
    found = compare_with_llama_cpp(model, tmp_path / "model.gguf", TOKENS, threads=1)
    # Of a dense model without any experts: 4e-5. Logits are of order 5.
    assert found.same_top1 >= 0.99 and found.max_diff < 1e-3, found


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.01), ("fp16", 1e-4), ("q8_0", 0.05)])
def test_types_cost_what_they_cost_a_dense_model(dtype: str, limit: float, tmp_path: Path) -> None:
    """llama.cpp rounds activations too. Another expert for one token is a jump, so here all experts run."""
    kl = {}
    for name in ("dense-llama-tied", "mixtral"):
        model = save(name, tmp_path / name)
        if name == "mixtral":
            model.config.num_experts_per_tok = model.config.num_local_experts
            model.config.save_pretrained(tmp_path / name)
            model = type(model).from_pretrained(tmp_path / name).eval()
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", dtype)
        kl[name] = compare_with_llama_cpp(model, tmp_path / f"{name}.gguf", TOKENS, threads=1).kl
    assert kl["mixtral"] < min(limit, 4 * kl["dense-llama-tied"]), kl


def test_a_file_that_llama_cpp_refuses_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    path = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32").path
    path.write_bytes(path.read_bytes().replace(b"expert_used_count", b"expert_oops_count"))
    with pytest.raises(ValueError, match=r"llama\.cpp ends with status .* on .*model\.gguf"):
        compare_with_llama_cpp(model, path, TOKENS, threads=1)
