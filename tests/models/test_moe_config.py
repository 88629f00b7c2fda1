"""`MoEConfig`: what it takes, refuses, and writes."""

import json
from pathlib import Path

import pytest
from models.tiny import decoder_config
from transformers import AutoConfig, BertConfig, CohereConfig, Gemma2Config, GPT2Config, PreTrainedConfig, T5Config

from moe.layer import MoESpec
from moe.models import MoEConfig, MoEForCausalLM

MOE = {
    "num_experts": 6,
    "granularity": 2,
    "num_shared_experts": 1,
    "every": 2,
    "router": {"name": "topk", "top_k": 3, "score": "sigmoid"},
    "balance": {"aux_coef": 0.5, "aux_scope": "sequence", "z_coef": 0.25},
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_config_round_trip(kind: str, tmp_path: Path) -> None:
    config = MoEConfig(text_config=decoder_config(kind, hidden_size=20), moe=MOE)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "moe_decoder"
    assert written["text_config"]["model_type"] == kind
    assert written["moe"]["balance"] == {
        "aux_coef": 0.5,
        "aux_scope": "sequence",
        "z_coef": 0.25,
        "bias_update_rate": 0.0,
    }
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is MoEConfig
    assert type(read.text_config) is type(config.text_config)
    assert read.spec == config.spec == MoESpec.from_dict(MOE)
    assert read.text_config.to_diff_dict() == config.text_config.to_diff_dict()
    assert read.get_text_config().hidden_size == 20
    assert "moe_decoder" in repr(read)


def test_decoder_may_be_a_dict_and_the_default_spec_is_written_out() -> None:
    config = MoEConfig(text_config={"model_type": "qwen3", "hidden_size": 24})
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("qwen3", 24)
    assert config.moe == MoESpec().to_dict()
    assert AutoConfig.for_model(**config.to_dict()).spec == MoESpec()


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_the_decoders(tied: bool) -> None:
    assert MoEConfig(text_config=decoder_config(tie_word_embeddings=tied)).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_expert": 4}, "moe.num_expert is not an option; did you mean 'num_experts'"),
        ({"balance": {"aux_coeff": 1}}, "moe.balance.aux_coeff is not an option; did you mean 'aux_coef'"),
        (
            {"router": {"name": "topk", "topk": 3}},
            "router.topk is not an option of router 'topk'; did you mean 'top_k'",
        ),
        ({"router": {"name": "topp"}}, "did you mean 'topk'"),
        ({"num_experts": 2, "router": {"name": "topk", "top_k": 3}}, "router.top_k=3 is more than num_experts=2"),
        ({"balance": {"bias_update_rate": 1e-3}}, "needs a router with a selection bias"),
    ],
)
def test_wrong_spec(moe: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(text_config=decoder_config(), moe=moe)
    MoEConfig(text_config=decoder_config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe": moe}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def small(config_class: type[PreTrainedConfig], **values: object) -> PreTrainedConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "pad_token_id": 0}
    return config_class(**(sizes | values))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (small(GPT2Config), "model_type='gpt2' keeps its FFNs elsewhere than model.layers"),
        (small(BertConfig), "model_type='bert' keeps its FFNs elsewhere than model.layers"),
        (small(T5Config), "model_type='t5' is not a causal decoder"),
        (small(Gemma2Config), "text_config.final_logit_softcapping=30.0 of model_type='gemma2'.* set it to null"),
        (small(CohereConfig), "text_config.logit_scale=0.0625 of model_type='cohere'.* set it to 1"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_decoders_that_do_not_fit(decoder: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEForCausalLM(MoEConfig(text_config=decoder, moe={"num_experts": 4}))


@pytest.mark.parametrize("moe", [{"first_dense_layers": 2}, {"every": 3}])
def test_a_spec_without_any_moe_layer(moe: dict) -> None:
    with pytest.raises(ValueError, match="leave none of the 2 layers"):
        MoEForCausalLM(MoEConfig(text_config=decoder_config(), moe=moe))


def test_granularity_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"moe.granularity=5 does not divide the dense FFN width 12"):
        MoEForCausalLM(MoEConfig(text_config=decoder_config(), moe={"granularity": 5}))
