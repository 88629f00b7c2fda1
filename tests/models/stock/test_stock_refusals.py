"""What an architecture cannot express is refused by field and value, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest
from models.stock.stock_cases import GATED, SIGMOID, SUM_OF_TWO, SWITCH, TOP2, UNIT, dense_config
from models.tiny import make_model
from transformers import Olmo2Config

from moe.models import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.reformat import reformat
from moe.models.stock.write import check_fits, write_model

BIAS = {"router": {"name": "topk", "score": "softmax", "selection_bias": True}}
NO_BIAS_GROUPS = {"router": {"name": "topk", "score": "sigmoid", "num_groups": 2}}
SOFTMAX_GROUPS = {"router": {"name": "topk", "num_groups": 2}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
SHARED = {"num_shared_experts": 2}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
Refusal = tuple[str, str, dict[str, Any], dict[str, Any], str]
REFUSALS: list[Refusal] = [
    # to, decoder, moe, decoder's fields, what the message says
    ("mixtral", "llama", {"router": {"name": "hash"}}, {}, "moe.router.name='hash'"),
    ("mixtral", "llama", {"router": {"name": "kmeans"}}, {}, "moe.router.name='kmeans'"),
    ("mixtral", "llama", {"router": {"name": "sparsemixer"}}, {}, "moe.router.name='sparsemixer'"),
    ("mixtral", "llama", {"router": {"name": "modified_softmax"}}, {}, "moe.router.name='modified_softmax'"),
    ("mixtral", "llama", {"router": {"name": "topk", "score": "sigmoid"}}, {}, "moe.router.score='sigmoid'"),
    ("mixtral", "llama", SUM_OF_TWO, {}, "moe.router.renormalize=false"),
    ("mixtral", "llama", SWITCH, {}, "moe.router.renormalize=false"),
    ("mixtral", "llama", BIAS, {}, "moe.router.selection_bias=true"),
    ("mixtral", "llama", SOFTMAX_GROUPS, {}, "moe.router.num_groups=2"),
    ("mixtral", "llama", TOP2 | SHARED, {}, "moe.num_shared_experts=2"),
    ("mixtral", "llama", TOP2 | {"activation": "gelu"}, {}, "moe.activation='gelu'"),
    ("mixtral", "llama", TOP2 | {"eval_capacity_factor": 1.5}, {}, "moe.eval_capacity_factor=1.5"),
    ("mixtral", "llama", TOP2 | {"first_dense_layers": 1}, {}, "moe.first_dense_layers=1: "),
    ("mixtral", "llama", TOP2 | {"every": 2}, {}, "moe.every=2: "),
    ("mixtral", "llama", TOP2 | {"only_layers": [1]}, {}, r"moe.only_layers=\[1\]: "),
    ("mixtral", "llama", TOP2, {"hidden_act": "gelu"}, "text_config.hidden_act='gelu'"),
    ("mixtral", "llama", TOP2, PARTIAL, "partial_rotary_factor=0.5"),
    ("mixtral", "qwen2", TOP2, {}, "model_type='qwen2' has a bias of query, key and value"),
    ("mixtral", "qwen3", TOP2, {}, "model_type='qwen3' has norms of queries and keys"),
    ("qwen3_moe", "llama", TOP2, {}, "model_type='llama' lacks norms of queries and keys"),
    ("qwen3_moe", "qwen3", TOP2 | SHARED, {}, "moe.num_shared_experts=2"),
    ("qwen3_moe", "qwen3", TOP2, WINDOWS, "text_config.sliding_window=8 in 1 of 2 layers"),
    ("qwen2_moe", "qwen2", TOP2 | GATED, WINDOWS, "text_config.sliding_window=8 in 1 of 2 layers"),
    ("qwen2_moe", "qwen2", TOP2 | GATED, {"head_dim": 6}, "text_config.head_dim=6"),
    ("qwen2_moe", "qwen2", {"router": {"name": "topk", "score": "sigmoid"}}, {}, "moe.router.score='sigmoid'"),
    ("qwen2_moe", "llama", TOP2 | {"only_layers": [1]}, {"mlp_bias": True}, r"text_config.mlp_bias=true.*\[0\]"),
    ("glm4_moe", "llama", TOP2, {}, "moe.router.score='softmax'"),
    ("glm4_moe", "llama", SIGMOID | GATED, {}, "moe.shared_gate=true"),
    ("glm4_moe", "llama", SIGMOID | {"only_layers": [0]}, {}, r"moe.only_layers=\[0\]: its dense layers are the first"),
    ("glm4_moe", "llama", NO_BIAS_GROUPS, {}, "moe.router.num_groups=2 with moe.router.selection_bias=false"),
    ("glm4_moe", "llama", {"num_experts": 1} | UNIT, {}, "moe.num_experts=1"),
    ("glm4_moe", "mistral", SIGMOID, {"sliding_window": 8}, "text_config.sliding_window=8 in 2 of 2 layers"),
    ("glm4_moe", "qwen3", SIGMOID, {"attention_bias": True}, "has a bias of the attention's output"),
    ("dots1", "llama", SIGMOID, {}, "lacks norms of queries and keys"),
    ("olmoe", "llama", TOP2, {}, "text_config.model_type='llama': its attention is OLMoE's own"),
    ("deepseek_v3", "llama", SIGMOID, {}, "text_config.model_type='llama': its attention is DeepSeek-V3's own"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal[0]}-{refusal[4][:45]}")
def test_what_does_not_fit_is_named(refusal: Refusal) -> None:
    to, kind, moe, decoder, message = refusal
    config = MoEConfig(text_config=dense_config(kind, **decoder), moe={"num_experts": 4} | moe)
    with pytest.raises(ValueError, match=f"does not fit {to}: .*{message}"):
        check_fits(config, to)
    assert len(FORMATS[to].refusals(config)) == 1


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    moe = {"router": {"name": "topk", "score": "sigmoid"}, "num_shared_experts": 1, "first_dense_layers": 1}
    config = MoEConfig(text_config=dense_config("qwen3"), moe=moe)
    assert len(FORMATS["mixtral"].refusals(config)) == 4


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "moe"])
@pytest.mark.parametrize("router", ["soft", "mixture_of_tokens", "expert_choice", "relu", "dselect_k"])
def test_other_kinds_of_routing_fit_nowhere(to: str, router: str) -> None:
    config = MoEConfig(text_config=dense_config("llama"), moe={"router": {"name": router}})
    assert f"moe.router.name={router!r}" in " ".join(FORMATS[to].refusals(config)) or to in ("olmoe", "deepseek_v3")


def test_another_decoder_fits_only_ours() -> None:
    config = MoEConfig(text_config=Olmo2Config(num_hidden_layers=2), moe={"num_experts": 4})
    check_fits(config, "moe")
    with pytest.raises(ValueError, match=r"text_config.model_type='olmo2' is no decoder .*llama, mistral"):
        check_fits(config, "mixtral")


@pytest.mark.parametrize(
    ("kind", "decoder"), [("mistral", {"sliding_window": 128}), ("mistral", {"sliding_window": 4096}), ("llama", {})]
)
def test_a_window_over_all_positions_is_none(kind: str, decoder: dict[str, Any]) -> None:
    config = MoEConfig(text_config=dense_config(kind, **decoder), moe={"num_experts": 4} | SIGMOID)
    assert FORMATS["glm4_moe"].refusals(config) == []
    assert FORMATS["mixtral"].to_stock(MoEConfig(text_config=config.text_config, moe=TOP2)).sliding_window is None


@pytest.mark.parametrize(
    "moe",
    [
        TOP2 | {"capacity_factor": 1.0},
        {"router": {"name": "topk", "jitter": 0.1}},
        TOP2 | {"balance": {"z_coef": 0.1, "aux_scope": "sequence"}},
    ],
)
def test_what_only_training_sees_is_no_obstacle(moe: dict[str, Any]) -> None:
    config = MoEConfig(text_config=dense_config("llama"), moe=moe)
    assert FORMATS["mixtral"].refusals(config) == []


def test_a_refused_model_leaves_nothing(tmp_path: Path) -> None:
    make_model(router={"name": "hash"}).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="does not fit mixtral"):
        write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "out", "mixtral")
    with pytest.raises(ValueError, match="--to 'mixtrel' is unknown; use one of moe, mixtral"):
        write_model(reformat(ModelFolder(tmp_path / "ours")), tmp_path / "out", "mixtrel")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
