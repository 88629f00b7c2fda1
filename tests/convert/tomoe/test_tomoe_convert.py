"""The converted model is the masked model with hard choices; experts have one width and the neurons of the best scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moe.convert.dense import DenseFFN
from moe.convert.tomoe import ToMoEOptions, convert, report_lines, tomoe_convert
from moe.convert.tomoe.experts import ExpertPlan, plan_experts
from moe.convert.tomoe.gates import GatedModel
from moe.convert.tomoe.training import TrainedMasks
from moe.kernels.reference import activate

VOCAB, DIM, LAYERS, EXPERTS, NEURONS = 60, 16, 3, 4, 48


def dense_folder(folder: Path, kind: str = "llama") -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    make, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    model = make(
        config(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            initializer_range=0.3,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    model.save_pretrained(folder / kind)
    return folder / kind, model


def windows() -> Tensor:
    return torch.randint(0, VOCAB, (6, 24), generator=torch.Generator().manual_seed(2))


def options(**values: Any) -> ToMoEOptions:
    fields: dict[str, Any] = {"num_experts": EXPERTS, "width_multiple": 4, "lr": 1e-2, "steps": 12}
    return ToMoEOptions(**fields | values)


def random_masks(seed: int = 0, overlap: float = 0.0) -> TrainedMasks:
    generator = torch.Generator().manual_seed(seed)
    scores_LEF = torch.randn(LAYERS, EXPERTS, NEURONS, generator=generator)
    scores_LEF[:, :, : int(overlap * NEURONS)] += 10
    return TrainedMasks(scores_LEF=scores_LEF, router_LED=torch.randn(LAYERS, EXPERTS, DIM, generator=generator))


def masked_logits(model: Any, plan: ExpertPlan, ids: Tensor) -> Tensor:
    gated = GatedModel(model, EXPERTS)
    gated.set_masks(plan.masks())
    for gate, weight_ED in zip(gated.gates, plan.router_LED, strict=True):
        gate.router.weight.data.copy_(weight_ED)
    with torch.no_grad():
        logits = gated.logits(ids, on=True)
    gated.remove()
    return logits


@pytest.mark.parametrize(
    ("kind", "shared", "to"),
    [
        ("llama", False, "moe"),
        ("llama", True, "moe"),
        ("qwen3", False, "moe"),
        ("llama", False, "mixtral"),
        ("llama", True, "glm4_moe"),
        ("llama", False, "glm4_moe"),
        ("qwen3", False, "qwen3_moe"),
    ],
)
def test_converted_model_is_the_masked_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shared: bool, to: str
) -> None:
    source, model = dense_folder(tmp_path, kind)
    trained = random_masks(overlap=0.4)
    monkeypatch.setattr(convert, "train_masks", lambda *args: args[3](1, 1, {"kd": 0.0}) or trained)
    report = tomoe_convert(source, tmp_path / "out", windows(), options(), to=to, shared=shared)
    plan = plan_experts(trained, 0.5, 4, shared)
    assert (report.num_shared > 0) == shared
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        got = loaded.eval()(windows()).logits
    expected = masked_logits(model, plan, windows())
    assert (got - expected).abs().max() < 1e-5
    if to != "moe":
        assert not type(loaded).__module__.startswith("moe.")
        return
    counts = [layer.mlp.router(torch.randn(200, DIM)).counts_E for layer in loaded.model.layers]
    assert all((found > 0).sum() > 1 for found in counts)  # else nothing was routed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe"]["expert_hidden"] == report.width == plan.width


@pytest.mark.parametrize(
    ("dtype", "bf16", "computed"),
    [(torch.bfloat16, False, torch.float32), (torch.bfloat16, True, torch.bfloat16), (torch.float32, True, None)],
)
def test_a_half_precision_model_is_trained_on_in_fp32_unless_asked_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bf16: bool, computed: torch.dtype | None
) -> None:
    source, model = dense_folder(tmp_path)
    model.to(dtype).save_pretrained(source)
    seen, train = [], convert.train_masks

    def train_masks(model: Any, *rest: Any) -> TrainedMasks:
        seen.append(model.dtype)
        return train(model, *rest)

    monkeypatch.setattr(convert, "train_masks", train_masks)
    tomoe_convert(source, tmp_path / "out", windows(), options(steps=2, bf16=bf16))
    assert seen == [computed or dtype]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_trains_and_reports(tmp_path: Path) -> None:
    source, model = dense_folder(tmp_path)
    steps = []
    report = tomoe_convert(
        source,
        tmp_path / "out",
        windows(),
        options(),
        progress=lambda *call: steps.append(call),
        command="moe tomoe dense",
    )
    assert [step for step, _, _ in steps] == list(range(1, 13))
    assert report.active_share == 0.5
    assert report.width == NEURONS // 2
    assert report.last["kd"] >= 0
    assert any("too few steps" in line for line in report_lines(report))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "moe tomoe dense" in card
    assert "| FFN neurons that run per token | 50.0% |" in card
    # What is no FFN came over as it was.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_layer_is_rows_of_the_dense_ffn() -> None:
    """Per expert against the dense FFN with all other neurons set to zero."""
    ffn = DenseFFN(
        gate_FD=torch.randn(NEURONS, DIM), up_FD=torch.randn(NEURONS, DIM), down_DF=torch.randn(DIM, NEURONS)
    )
    plan = plan_experts(random_masks(overlap=0.4), 0.5, 1, shared=True)
    weights, x_TD = plan.layer(1, ffn), torch.randn(5, DIM)
    hidden_TF = torch.nn.functional.silu(x_TD @ ffn.gate_FD.T) * (x_TD @ ffn.up_FD.T)
    assert weights.shared_gate_up_HD is not None
    assert weights.shared_down_DF is not None
    shared_TD = activate(x_TD @ weights.shared_gate_up_HD.T, "swiglu") @ weights.shared_down_DF.T
    for expert in range(EXPERTS):
        hidden = activate(x_TD @ weights.gate_up_EHD[expert].T, "swiglu")
        expected_TD = (hidden_TF * plan.masks()[1, expert]) @ ffn.down_DF.T
        assert torch.allclose(hidden @ weights.down_EDF[expert].T + shared_TD, expected_TD, atol=1e-4)


def test_experts_are_the_best_neurons_in_one_width() -> None:
    trained = random_masks()
    plan = plan_experts(trained, 0.5, 1)
    assert plan.masks().sum(-1).unique().tolist() == [NEURONS // 2]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            ids_W = plan.routed_LEW[layer, expert]
            scores_F = trained.scores_LEF[layer, expert]
            assert torch.equal(ids_W, ids_W.sort().values)
            out_F = scores_F.clone()
            out_F[ids_W] = -100
            assert scores_F[ids_W].min() > out_F.max()
    assert plan.active_share == 0.5
    assert plan.stored_share == EXPERTS / 2
    assert plan.covered_share == pytest.approx(plan.masks().amax(1).mean().item())
    assert plan_experts(trained, 0.5, 16).width == 32


def test_shared_experts_hold_what_all_have_and_save_memory() -> None:
    trained = random_masks(overlap=0.3)
    plain, shared = plan_experts(trained, 0.5, 2), plan_experts(trained, 0.5, 2, shared=True)
    assert shared.num_shared >= 1
    assert shared.stored_share < plain.stored_share
    assert shared.active_share == plain.active_share
    assert torch.equal(shared.masks(), plain.masks())
    assert shared.shared_LS.shape[-1] == shared.num_shared * shared.width
    for layer in range(LAYERS):
        routed = set(shared.routed_LEW[layer].flatten().tolist())
        assert not routed & set(shared.shared_LS[layer].tolist())


def test_shared_experts_take_no_neuron_that_one_expert_lacks() -> None:
    """However much the others want it."""
    trained = random_masks(overlap=0.3)
    trained.scores_LEF[:, 0, NEURONS - 1] = -1.0
    trained.scores_LEF[:, 1:, NEURONS - 1] = 100.0
    plan = plan_experts(trained, 0.5, 2, shared=True)
    assert plan.num_shared >= 1
    assert not (plan.shared_LS == NEURONS - 1).any()
    assert plan.masks()[:, 0, NEURONS - 1].sum() == 0


def test_without_common_neurons_there_are_no_shared_experts() -> None:
    scores_LEF = torch.zeros(LAYERS, EXPERTS, NEURONS)
    for expert in range(EXPERTS):  # a partition
        scores_LEF[:, expert, expert * 12 : (expert + 1) * 12] = 1.0
    trained = TrainedMasks(scores_LEF=scores_LEF, router_LED=torch.zeros(LAYERS, EXPERTS, DIM))
    plan = plan_experts(trained, 0.25, 1, shared=True)
    assert plan.num_shared == 0
    assert plan.covered_share == 1.0
    assert plan.stored_share == 1.0


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any training."""
    monkeypatch.setattr(convert, "train_masks", lambda *args: pytest.fail("it trains"))
    source, _ = dense_folder(tmp_path)
    with pytest.raises(ValueError, match="width_multiple=32"):
        plan_experts(random_masks(), 0.9, 32)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="exists"):
        tomoe_convert(source, tmp_path / "taken", windows(), options())
    with pytest.raises(ValueError, match="--to 'nothing'"):
        tomoe_convert(source, tmp_path / "out", windows(), options(), to="nothing")
    with pytest.raises(ValueError, match=r"active_share=0\.9 of 48 neurons.*width_multiple=32, are as wide"):
        tomoe_convert(source, tmp_path / "out", windows(), options(active_share=0.9, width_multiple=32))
    with pytest.raises(ValueError, match=r"does not fit mixtral: .*num_shared_experts=1"):
        tomoe_convert(source, tmp_path / "out", windows(), options(), to="mixtral", shared=True)
    assert not (tmp_path / "out").exists()
