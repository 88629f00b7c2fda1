"""`MoEForCausalLM` from scratch: what it is made of, initialisation, and its forward against the decoder's own."""

from typing import Any

import pytest
import torch
from models.tiny import DIM, EXPERTS, HIDDEN, VOCAB, layers_of, make_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from moe.layer import MoELayer
from moe.models import MoEForCausalLM

KINDS = ["llama", "qwen3", "mistral"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes(kind: str, tied: bool) -> None:
    model = make_model(
        kind, decoder={"tie_word_embeddings": tied}, num_shared_experts=2, granularity=2, shared_gate=True
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        assert shapes[prefix + "mlp.router.weight"] == (EXPERTS, DIM)
        assert shapes[prefix + "mlp.experts.gate_up_proj"] == (EXPERTS, HIDDEN, DIM)
        assert shapes[prefix + "mlp.experts.down_proj"] == (EXPERTS, DIM, HIDDEN // 2)
        assert shapes[prefix + "mlp.shared_experts.gate_up_proj.weight"] == (2 * HIDDEN, DIM)
        assert shapes[prefix + "mlp.shared_experts.down_proj.weight"] == (DIM, HIDDEN)
        assert shapes[prefix + "mlp.shared_experts.gate.weight"] == (1, DIM)
        assert shapes[prefix + "self_attn.q_proj.weight"] == (16, DIM)
        assert shapes[prefix + "self_attn.k_proj.weight"] == (8, DIM)
    assert shapes["lm_head.weight"] == (VOCAB, DIM)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tied
    assert len(layers_of(model)) == 2
    assert all(layer.context is model.routing_context for layer in layers_of(model))
    output = model(tokens(3, 7))
    assert output.logits.shape == (3, 7, VOCAB)
    assert output.loss is None


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({}, "MMMMM"),
        ({"first_dense_layers": 2}, "--MMM"),
        ({"every": 2}, "-M-M-"),
        ({"first_dense_layers": 1, "every": 2}, "--M-M"),
        ({"every": 5}, "----M"),
    ],
)
def test_which_layers_are_moe(moe: dict, expected: str) -> None:
    model = make_model(decoder={"num_hidden_layers": 5}, **moe)
    assert "".join("M" if isinstance(layer.mlp, MoELayer) else "-" for layer in model.model.layers) == expected


def test_gelu_experts() -> None:
    model = make_model(activation="gelu", num_shared_experts=1)
    layer = layers_of(model)[0]
    assert layer.experts.gate_up_proj.shape == (EXPERTS, HIDDEN, DIM)
    x_TD = torch.randn(6, DIM)
    hidden = nn.functional.gelu(x_TD @ layer.shared_experts.gate_up_proj.weight.T)
    torch.testing.assert_close(layer.shared_experts(x_TD), hidden @ layer.shared_experts.down_proj.weight.T)


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initial_deviations(std: float) -> None:
    """Statistical bounds: five sigma of the sample deviation."""
    sizes = {"initializer_range": std, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    model = make_model(decoder=sizes, num_experts=16, num_shared_experts=1, shared_gate=True)
    for name, value in model.named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
            continue
        assert (value.std() / std).item() == pytest.approx(1, abs=5 / (2 * value.numel()) ** 0.5), name
        assert abs(value.mean().item()) < 5 * std / value.numel() ** 0.5, name
    experts = layers_of(model)[0].experts
    assert not torch.equal(experts.gate_up_proj[0], experts.gate_up_proj[1])


def test_router_keeps_its_own_rule() -> None:
    """Switch: sqrt(0.1 / D), whatever the decoder's range."""
    sizes = {"hidden_size": 64, "initializer_range": 1.0}
    model = make_model(decoder=sizes, num_experts=64, router={"name": "switch"})
    weight = layers_of(model)[0].router.weight
    limit = (0.1 / 64) ** 0.5
    assert weight.abs().max() <= 2 * limit
    assert 0.8 * limit < weight.std() < limit


def test_padding_row_of_the_embedding_is_zero_as_in_the_decoder() -> None:
    assert (make_model().model.embed_tokens.weight[0] == 0).all()


def test_same_seed_same_weights() -> None:
    first, again, other = (make_model(seed=seed, num_shared_experts=1) for seed in (3, 3, 4))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        if "norm" not in name:
            assert not torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_config(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(make_model().config, dtype=dtype)
    assert type(model) is MoEForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens(2, 5)).logits.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_identical_experts_compute_the_dense_decoder(kind: str) -> None:
    """With the dense FFN in every expert, weights that sum to one give transformers' own logits."""
    model = make_model(kind).eval()
    dense = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".mlp." not in k}, strict=False)
    with torch.no_grad():
        for mine, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            mine.mlp.experts.gate_up_proj[:] = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
            mine.mlp.experts.down_proj[:] = theirs.mlp.down_proj.weight
    ids = tokens(3, 9)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_causal() -> None:
    model, ids = make_model().eval(), tokens(2, 8)
    changed = ids.clone()
    changed[:, 5:] = tokens(2, 3, seed=9)
    first, second = model(ids).logits, model(changed).logits
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(keep: Any) -> None:
    model, ids = make_model().eval(), tokens(2, 6)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, kept])


def test_other_ways_in_and_out() -> None:
    model, ids = make_model().eval(), tokens(2, 6)
    expected = model(ids)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected.logits)
    assert torch.equal(model(ids, return_dict=False)[0], expected.logits)
    positions = torch.arange(6).expand(2, 6)
    assert torch.equal(model(ids, position_ids=positions).logits, expected.logits)
    assert not torch.allclose(model(ids, position_ids=positions * 3).logits, expected.logits)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in hidden] == [(2, 6, DIM)] * 3


def test_attention_implementation_reaches_the_decoder() -> None:
    model = make_model()
    eager = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    output = eager(tokens(2, 6), output_attentions=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 6, 6)] * 2
    torch.testing.assert_close(output.logits, model.eval()(tokens(2, 6)).logits, atol=1e-4, rtol=1e-4)


def test_use_cache_of_the_config_is_respected() -> None:
    model, ids = make_model().eval(), tokens(1, 4)
    assert model(ids).past_key_values is not None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 4


def test_resized_embeddings() -> None:
    model = make_model()
    model.resize_token_embeddings(VOCAB + 7)
    ids = torch.full((2, 5), VOCAB + 6)
    output = model(ids, labels=ids)
    assert output.logits.shape[-1] == VOCAB + 7
    assert output.loss.isfinite()


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_selection_bias_stays_fp32(convert: Any) -> None:
    """In bf16 a bias of 1 would not move by steps of 1e-3."""
    model = make_model(router={"name": "noaux_tc"}, balance={"bias_update_rate": 1e-3})
    for layer in layers_of(model):
        layer.router.bias_E.fill_(1.0)
    model = convert(model)
    assert model.lm_head.weight.dtype != torch.float32
    for layer in layers_of(model):
        bias_E = layer.router.bias_E
        assert bias_E.dtype == torch.float32
        assert bias_E is dict(layer.router.named_buffers())["bias_E"]
        layer.stats.add(torch.tensor([9, 1, 1, 1]), {"tokens": torch.tensor(6.0)})
        layer.finish_step()
        torch.testing.assert_close(bias_E, torch.tensor([0.999, 1.001, 1.001, 1.001]), atol=1e-6, rtol=0)


def test_bf16_model_decides_in_fp32() -> None:
    model = make_model().to(torch.bfloat16)
    router = layers_of(model)[0].router
    x_TD = torch.randn(500, DIM, dtype=torch.bfloat16)
    routing = router(x_TD)
    expected = x_TD.float() @ router.weight.float().T
    assert routing.logits_TE.dtype == routing.weights_N.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE, expected)
    assert not torch.equal(routing.logits_TE, (x_TD @ router.weight.T).float()), "bf16 would give the same"
    assert torch.equal(routing.expert_ids_N.view(-1, 2), expected.topk(2).indices)


def test_inference_mode_from_the_start() -> None:
    with torch.inference_mode():
        model = make_model().eval()
        assert model(tokens(1, 4)).logits.is_inference()
