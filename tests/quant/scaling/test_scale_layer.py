"""Scaling leaves what a layer computes and changes what is rounded, in every architecture and with every scaler."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, Glm4MoeConfig

from moe.quant.layer import moe_of
from moe.quant.scaling import SCALERS, scale_layer
from moe.quant.scaling.find import find_sites
from moe.quant.scaling.norms import find_gain
from moe.quant.schemes import SCHEMES
from tests.models.tiny import DIM, HIDDEN, VOCAB
from tests.quant.scaling.quant_layer_case import LayerCase, make_case, without_tokens

TOLERANCE = 1e-5
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "glm4_moe": (
        Glm4MoeConfig(**SMALL, first_k_dense_replace=2, attention_bias=True, use_qk_norm=True),
        {"router": {"name": "noaux_tc", "top_k": 2}, "num_shared_experts": 2},
    ),
    "gemma": (GemmaConfig(**SMALL), {}),
    "shared": ("llama", {"num_shared_experts": 1, "shared_gate": True}),
    "dense": ("llama", {"first_dense_layers": 1}),
    "gelu": ("llama", {"activation": "gelu"}),
    "cmoe": ("llama", {"router": {"name": "cmoe", "top_k": 2}}),
}


def case_of(name: str) -> LayerCase:
    kind, moe = CASES[name]
    return make_case(copy.deepcopy(kind), **moe)


def assert_same_function(case: LayerCase, before: torch.Tensor) -> None:
    error = (case.output() - before).abs().max() / before.abs().max()
    assert error < TOLERANCE, f"its output changes by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_any_scales_leave_the_function(name: str) -> None:
    case = case_of(name)
    before = case.output()
    sites = find_sites(case.layer, case.inputs)
    for site in sites.found:
        reader = site.readers[0]
        columns = reader.weight_PQ.shape[1] if site.scale_of_Q is None else int(site.scale_of_Q.max()) + 1
        old = reader.weight_PQ.clone()
        site.fold(torch.empty(columns).uniform_(0.2, 5), torch.float32)
        assert not torch.allclose(old, reader.weight_PQ), site.name
    assert_same_function(case, before)
    # GELU of the experts is the one thing that is not linear in its up-projection.
    up = set() if name == "gelu" else {"up"}
    assert {site.kind for site in sites.found} == {"attention", "value", "dense" if name == "dense" else "moe"} | up
    assert len(sites.notes) == (name == "gelu")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scaling", SCALERS)
def test_scaler_leaves_the_function_and_scales_inputs_along(scaling: str, name: str) -> None:
    case = case_of(name)
    before, old = case.output(), copy.deepcopy(case.inputs)
    scale_layer(case.layer, case.inputs, scaling, SCHEMES["w4a4"], torch.float32, rounds_router=True)
    assert_same_function(case, before)
    now = case.captured()
    for key, rows_TQ in now.linear.items():
        torch.testing.assert_close(case.inputs.linear[key], rows_TQ, rtol=1e-4, atol=1e-4)
    if now.ffn_TD is not None:
        torch.testing.assert_close(case.inputs.ffn_TD, now.ffn_TD, rtol=1e-4, atol=1e-4)
    changed = "self_attn.q_proj"
    assert not torch.allclose(case.inputs.linear[changed], old.linear[changed])


def test_every_reader_of_the_ffn_norm_is_found() -> None:
    case = case_of("shared")
    (site,) = [site for site in find_sites(case.layer, case.inputs).found if site.kind == "moe"]
    experts = [f"mlp.experts.gate_up_proj, expert {expert}" for expert in range(4)]
    shared = ["shared_experts.gate", "mlp.shared_experts.gate_up_proj"]
    assert [reader.name for reader in site.readers] == ["router.weight", *shared, *experts]
    assert [reader.is_quantized for reader in site.readers] == [False, False, True, *[True] * 4]


def test_query_heads_of_a_group_share_the_scales_of_their_kv_head() -> None:
    case = case_of("llama")
    (site,) = [site for site in find_sites(case.layer, case.inputs).found if site.kind == "value"]
    # 4 heads of 4 channels read 2 KV heads.
    first, second = list(range(4)), list(range(4, 8))
    assert site.scale_of_Q is not None
    assert site.scale_of_Q.tolist() == first + first + second + second
    values_Q = torch.arange(16.0)
    assert site.largest(values_Q).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert site.mean(values_Q).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]


def test_rows_that_share_storage_are_divided_once() -> None:
    case = case_of("shared")
    assert case.inputs.ffn_TD is not None
    # As the engine gives them: one tensor for both, here of different lengths.
    case.inputs.linear["mlp.shared_experts.gate_up_proj"] = case.inputs.ffn_TD[:50]
    before = case.inputs.ffn_TD.clone()
    (site,) = [site for site in find_sites(case.layer, case.inputs).found if site.kind == "moe"]
    site.fold(torch.full((DIM,), 2.0), torch.float32)
    torch.testing.assert_close(case.inputs.ffn_TD, before / 2)
    torch.testing.assert_close(case.inputs.linear["mlp.shared_experts.gate_up_proj"], before[:50] / 2)


class _Sandwich(nn.Module):
    """A norm that is followed by something that is no gain."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).tanh()


def test_what_cannot_be_folded_is_left_with_a_note() -> None:
    case = case_of("shared")
    before = case.output()
    layer: Any = case.layer
    odd = _Sandwich(layer.input_layernorm)
    assert find_gain(odd) is None
    layer.input_layernorm = odd
    assert any("_Sandwich is not a gain" in note for note in find_sites(layer, case.inputs).notes)
    layer.input_layernorm = odd.norm
    # The rows of another norm, and of another attention.
    case.inputs.linear["self_attn.q_proj"] *= 3
    case.inputs.linear["self_attn.o_proj"][0] += 1
    notes = find_sites(layer, case.inputs).notes
    assert any("not the output of input_layernorm" in note for note in notes)
    assert any("o_proj reads something else" in note for note in notes)
    scale_layer(layer, case.inputs, "smoothquant", SCHEMES["w8a8"], torch.float32, rounds_router=False)
    assert_same_function(case, before)


@pytest.mark.parametrize("options", [{"name": "kmeans"}, {"name": "modified_softmax", "transform": "normalize"}])
def test_router_that_is_not_linear_is_left_with_a_note(options: dict[str, Any]) -> None:
    case = make_case("llama", router=options)
    before = case.output()
    notes = scale_layer(case.layer, case.inputs, "eaquant", SCHEMES["w4a4"], torch.float32, rounds_router=True)
    assert len(notes) == 1 and "is not a function of a product with its weights" in notes[0]
    assert_same_function(case, before)


@pytest.mark.parametrize("scaling", SCALERS)
@pytest.mark.parametrize("empty", [1, 4])
def test_experts_without_tokens(scaling: str, empty: int) -> None:
    case = case_of("llama")
    before, inputs = case.output(), case.inputs
    for expert in range(empty):
        inputs = without_tokens(inputs, expert)
    scale_layer(case.layer, inputs, scaling, SCHEMES["w4a4"], torch.float32, rounds_router=True)
    assert all(bool(parameter.isfinite().all()) for parameter in case.layer.parameters())
    assert_same_function(case, before)


def test_norms_are_exact_in_the_dtype_of_the_checkpoint() -> None:
    for name in ("llama", "gemma"):
        case = case_of(name)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = case.layer.get_parameter(f"{norm}.weight")
            weight.data.copy_(weight.bfloat16().float())
        before = case.output()
        inputs = case.captured()
        scale_layer(case.layer, inputs, "smoothquant", SCHEMES["w8a8"], torch.bfloat16, rounds_router=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = case.layer.get_parameter(f"{norm}.weight").data
            # bf16 itself would round by 2^-9; the difference is that of fp32.
            torch.testing.assert_close(weight, weight.bfloat16().float(), rtol=1e-6, atol=1e-6)
        assert_same_function(case, before)


def test_router_still_chooses_as_before() -> None:
    case = case_of("shared")
    old = case.inputs
    tokens = [ids.clone() for ids in old.tokens_e]
    scale_layer(case.layer, case.inputs, "eaquant", SCHEMES["w4a4"], torch.float32, rounds_router=True)
    moe = moe_of(case.layer)
    assert moe is not None and case.inputs.ffn_TD is not None
    routing = moe.router(case.inputs.ffn_TD)
    for expert, ids in enumerate(tokens):
        assert torch.equal(routing.token_ids_N[routing.expert_ids_N == expert], ids)
