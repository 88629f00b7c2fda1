"""What is in the file, read by others' code: the package gguf, and transformers where it reads GGUF."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models.gguf.gguf_models import DECODER, LLAMA3_ROPE, VOCAB, make, ours, save
from transformers import AutoModelForCausalLM, Qwen3Config

from moe.models import MoEConfig, MoEForCausalLM
from moe.models.gguf import tensors as gguf_tensors
from moe.models.gguf.verify import check_contents
from moe.models.gguf.write import write_gguf

gguf = pytest.importorskip("gguf")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys, and tensors as fp32."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).view([int(n) for n in reversed(tensor.shape)])
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    """It reads no MoE of ours whole: it leaves out the head's width of Qwen3, and does not know Mixtral and GLM4-MoE."""
    model = save("dense-llama-tied", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    tokens = torch.randint(VOCAB, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


ATTENTION = ["attn_k.weight", "attn_norm.weight", "attn_output.weight", "attn_q.weight", "attn_v.weight"]
EXPERTS = ["ffn_down_exps.weight", "ffn_gate_exps.weight", "ffn_gate_inp.weight", "ffn_up_exps.weight"]
SHARED = ["ffn_down_shexp.weight", "ffn_gate_shexp.weight", "ffn_up_shexp.weight"]
BIASES = ["attn_k.bias", "attn_q.bias", "attn_v.bias"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixtral", [*ATTENTION, *EXPERTS, "ffn_norm.weight"]),
        ("qwen3-moe", [*ATTENTION, "attn_k_norm.weight", "attn_q_norm.weight", *EXPERTS, "ffn_norm.weight"]),
        ("qwen2-moe", [*ATTENTION, *BIASES, *EXPERTS, *SHARED, "ffn_gate_inp_shexp.weight", "ffn_norm.weight"]),
        ("qwen2-moe-tied", [*ATTENTION, *BIASES, *EXPERTS, *SHARED, "ffn_gate_inp_shexp.weight", "ffn_norm.weight"]),
        ("glm4-moe", [*ATTENTION, *EXPERTS, *SHARED, "exp_probs_b.bias", "post_attention_norm.weight"]),
        (
            "glm4-moe-biases-norms",
            [*ATTENTION, *BIASES, *EXPERTS, *SHARED, "exp_probs_b.bias", "post_attention_norm.weight"],
        ),
    ],
)
def test_names_of_a_layer_are_those_of_the_architecture(name: str, expected: list[str], tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp16")
    _, tensors = contents(tmp_path / "model.gguf")
    assert {n.removeprefix("blk.2.") for n in tensors if n.startswith("blk.2.")} == set(expected)
    outside = {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert {n for n in tensors if not n.startswith("blk.")} == outside


def test_mixtral_tensors_are_the_experts_of_the_model(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32")
    keys, tensors = contents(tmp_path / "model.gguf")
    state = model.state_dict()
    for layer in range(3):
        gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"]
        for expert in range(4):
            assert torch.equal(tensors[f"blk.{layer}.ffn_gate_exps.weight"][expert], gate_up[expert, :96])
            assert torch.equal(tensors[f"blk.{layer}.ffn_up_exps.weight"][expert], gate_up[expert, 96:])
            assert torch.equal(tensors[f"blk.{layer}.ffn_down_exps.weight"][expert], down[expert])
        query = state[f"model.layers.{layer}.self_attn.q_proj.weight"]
        for head in range(4):
            for pair in range(8):  # neighbours in the file are halves of the head in the model
                row = 16 * head + 2 * pair
                assert torch.equal(tensors[f"blk.{layer}.attn_q.weight"][row], query[16 * head + pair])
                assert torch.equal(tensors[f"blk.{layer}.attn_q.weight"][row + 1], query[16 * head + pair + 8])
    assert keys["llama.expert_count"] == 4 and keys["llama.expert_used_count"] == 2
    assert keys["llama.feed_forward_length"] == 96
    assert check_contents(tmp_path / "model", tmp_path / "model.gguf", "fp32") == len(tensors)


def test_the_gate_of_glm4_moe_is_in_the_keys(tmp_path: Path) -> None:
    model = save("ours-sigmoid-carved", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "bf16")
    keys, tensors = contents(tmp_path / "model.gguf")
    found = {key.removeprefix("glm4moe."): value for key, value in keys.items() if "expert" in key or "dense" in key}
    assert found == {
        "expert_count": 6,
        "expert_used_count": 3,
        "expert_feed_forward_length": 24,
        "expert_shared_count": 2,
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 3.0,
    }
    bias_E = dict(model.named_buffers())["model.layers.1.mlp.router.bias_E"]
    assert torch.equal(tensors["blk.1.exp_probs_b.bias"], bias_E) and bias_E.any()
    assert "blk.0.ffn_gate.weight" in tensors and "blk.0.ffn_gate_inp.weight" not in tensors
    shared = dict(model.named_parameters())["model.layers.1.mlp.shared_experts.gate_up_proj.weight"].bfloat16().float()
    assert torch.equal(tensors["blk.1.ffn_gate_shexp.weight"], shared[:48])
    assert torch.equal(tensors["blk.1.ffn_up_shexp.weight"], shared[48:])
    # Gates and norms keep fp32.
    weight = dict(model.named_parameters())["model.layers.1.mlp.router.weight"]
    assert torch.equal(tensors["blk.1.ffn_gate_inp.weight"], weight)
    assert not torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ours-switch-without-shared",
            {"expert_gating_func": 1, "expert_weights_norm": False, "expert_shared_count": 1},
        ),
        ("glm4-moe-groups", {"expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_norm": True}),
        ("ours-softmax-with-bias", {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0}),
    ],
)
def test_other_gates_are_in_the_keys(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    keys, tensors = contents(tmp_path / "model.gguf")
    assert {key: keys[f"glm4moe.{key}"] for key in expected} == expected
    assert tensors["blk.1.ffn_down_shexp.weight"].any() == (name != "ours-switch-without-shared")


def test_a_scale_that_llama_cpp_lacks_is_in_the_weights(tmp_path: Path) -> None:
    model = save("ours-top1-scaled", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32")
    _, tensors = contents(tmp_path / "model.gguf")
    down_EDF = dict(model.named_parameters())["model.layers.1.mlp.experts.down_proj"].detach()
    torch.testing.assert_close(tensors["blk.1.ffn_down_exps.weight"], 0.7 * down_EDF)


def test_rotary_scaling_is_in_the_file(tmp_path: Path) -> None:
    save("ours-topk", tmp_path / "linear")
    write_gguf(tmp_path / "linear", tmp_path / "linear.gguf")
    keys, _ = contents(tmp_path / "linear.gguf")
    assert keys["llama.rope.scaling.type"] == "linear" and keys["llama.rope.scaling.factor"] == 2.5
    assert keys["llama.rope.freq_base"] == 1e4 and keys["llama.rope.dimension_count"] == 16
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    model, plain = save("dense-llama3-rope", tmp_path / "llama3"), make("dense-llama-tied")
    write_gguf(tmp_path / "llama3", tmp_path / "llama3.gguf")
    _, tensors = contents(tmp_path / "llama3.gguf")
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(tensors["rope_freqs.weight"], factors, rtol=1e-5, atol=0)
    assert factors.min() == 1 and factors.max() == pytest.approx(8)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_types_round_as_they_should(dtype: str, tmp_path: Path) -> None:
    model = save("qwen2-moe", tmp_path / "model")
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    assert written.num_bytes == (tmp_path / "model.gguf").stat().st_size
    _, tensors = contents(tmp_path / "model.gguf")
    found = tensors["blk.2.ffn_down_exps.weight"]
    expected = model.state_dict()["model.layers.2.mlp.experts.down_proj"]
    if dtype == "q8_0":
        # A block of 32 has steps of 1/127 of its largest value, and a scale in fp16.
        largest = expected.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        error = (found - expected).abs().unflatten(-1, (-1, 32))
        assert (error <= largest * (0.5 / 127 + 2**-11)).all() and error.max() > largest.max() / 300
    else:
        rounded = expected.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
        assert torch.equal(found, rounded.float())
    assert check_contents(tmp_path / "model", tmp_path / "model.gguf", dtype) == written.num_tensors


def test_rows_that_do_not_divide_into_blocks_stay_fp16(tmp_path: Path) -> None:
    model = ours(moe={"expert_hidden": 40})
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16" and kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"


def test_check_contents_finds_any_change(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    path = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32").path
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] += 1
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down_exps\.weight differs"):
        check_contents(tmp_path / "changed", path, "fp32")
    model.config.num_experts_per_tok = 3
    model.config.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match=r"llama\.expert_used_count is 2 instead of 3"):
        check_contents(tmp_path / "changed", path, "fp32")
    with pytest.raises(ValueError, match=r"is F32 .*, not F16"):
        check_contents(tmp_path / "model", path, "fp16")


def test_one_layer_is_read_once_and_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe.models.gguf.source import GGUFSource

    save("mixtral", tmp_path / "model")
    reads: list[int] = []
    original = GGUFSource.moe_weights
    monkeypatch.setattr(GGUFSource, "moe_weights", lambda self, layer: (reads.append(layer), original(self, layer))[1])
    readers: list[Any] = []
    init = gguf_tensors._LayerReader.__init__

    def remember(self: Any, *args: Any) -> None:
        init(self, *args)
        readers.append(self)

    monkeypatch.setattr(gguf_tensors._LayerReader, "__init__", remember)
    held: list[int] = []

    def progress(done: int, total: int) -> None:
        held.append(sum(reader._weights is not None for reader in readers))

    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp32", progress)
    assert reads == [0, 1, 2] and max(held) == 1 and held[-1] == 0


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf exists"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="dtype 'int3' is unknown; use one of fp32, fp16, bf16, q8_0"):
        write_gguf(tmp_path / "model", tmp_path / "other.gguf", "int3")


def test_a_file_gets_its_name_after_its_check(tmp_path: Path) -> None:
    """The check sees the complete file under another name in the same folder; what it refuses is gone."""
    save("mixtral", tmp_path / "model")
    seen: list[Path] = []

    def pass_it(file: Path) -> None:
        assert file.parent == tmp_path and not (tmp_path / "model.gguf").exists()
        seen.append(file)
        check_contents(tmp_path / "model", file, "fp16")

    def refuse(file: Path) -> None:
        seen.append(file)
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", check=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", check=pass_it)
    assert len(seen) == 2 and written.path.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: ours(moe={"router": {"name": "dselect_k"}}), "router.name='dselect_k'"),
        (lambda: ours(moe={"activation": "gelu"}), "activation='gelu'"),
        (lambda: ours(moe={"eval_capacity_factor": 1.5}), "eval_capacity_factor=1.5"),
        (lambda: ours(moe={"only_layers": [0, 2]}), "glm4moe: moe.only_layers=.*these would be"),
        (lambda: ours(moe={"num_shared_experts": 1, "shared_gate": True}), "qwen2moe: .*renormalize=true: it never"),
        (lambda: ours(Qwen3Config, rope_parameters=LLAMA3_ROPE, head_dim=16), "qwen3moe: rope_type='llama3'"),
        (
            lambda: ours(moe={"first_dense_layers": 1}, rope_parameters=LLAMA3_ROPE),
            "glm4moe: rope_type='llama3': it has default, linear",
        ),
        (
            lambda: ours(moe={"router": {"name": "topk", "num_groups": 2, "top_k_groups": 1}}),
            "num_groups=2 with moe.router.selection_bias=false",
        ),
    ],
)
def test_what_does_not_fit_is_named(model: Any, problem: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=problem):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_a_gate_of_zero_is_refused(tmp_path: Path) -> None:
    model = make("qwen2-moe")
    torch.nn.init.zeros_(model.model.layers[1].mlp.shared_expert_gate.weight)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="gate of the shared experts of layer 1 is zero"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = make("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[0, 0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.bf16.gguf", "bf16")
    with pytest.raises(ValueError, match=r"blk\.2\.ffn_down_exps\.weight has values that F16 cannot hold"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "fp16")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    model = MoEForCausalLM(MoEConfig(text_config=Qwen3Config(**DECODER, head_dim=16), moe={"num_experts": 4}))
    model.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.sinks has no place"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
