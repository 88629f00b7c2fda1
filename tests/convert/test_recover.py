"""Recovery training: the loss falls, routers keep their scale, LoRA merges exactly, the folder is whole and of the same dtypes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe.convert.distill import distillation
from moe.convert.recover import Point, RecoverOptions, Recovery, recover_folder
from moe.convert.recover.lora import add_lora
from moe.convert.recover.routers import router_parameters, router_scales
from moe.convert.recover.training import lr_factor
from moe.layer import moe_layers
from moe.models import MoEConfig, MoEForCausalLM
from moe.models.folder import ModelFolder

VOCAB, EPS = 40, 2.0**-10
GATE = {
    "name": "topk",
    "top_k": 2,
    "score": "sigmoid",
    "renormalize": True,
    "selection_bias": True,
    "route_scale": 2.0,
}


def decoder() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def carved_model(**moe: Any) -> MoEForCausalLM:
    """As carving leaves it: unit weights through a gate with tiny rows."""
    torch.manual_seed(0)
    spec = {"num_experts": 4, "expert_hidden": 8, "num_shared_experts": 1, "balance": {"aux_coef": 0.0}, "router": GATE}
    model = MoEForCausalLM(MoEConfig(text_config=decoder(), moe=spec | moe))
    for layer in moe_layers(model).values():
        if layer.spec.router == GATE:
            layer.router.weight.data.mul_(EPS)
    return model.eval()


def text(count: int = 16, seed: int = 0) -> Tensor:
    """Windows with something to learn: every second token is the one before plus one."""
    ids_BL = torch.randint(0, VOCAB // 2, (count, 16), generator=torch.Generator().manual_seed(seed))
    return torch.stack((2 * ids_BL, 2 * ids_BL + 1), -1).flatten(1)


def options(**values: Any) -> RecoverOptions:
    return RecoverOptions(**{"steps": 15, "batch_size": 4, "lr": 1e-2} | values)


def recover(model: Any, **values: Any) -> tuple[Recovery, list[Point]]:
    recovery = Recovery(model, text(), text(4, seed=1), options(**values))
    return recovery, recovery.run()


def routers(model: Any) -> list[Tensor]:
    return [layer.router.weight.detach().clone() for layer in moe_layers(model).values()]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_held_out_loss_falls_and_routers_stay(mode: str) -> None:
    model = carved_model()
    before = routers(model)
    recovery, points = recover(model, mode=mode)
    assert [point.step for point in points] == list(range(16))
    first, last = points[0].held_out, points[-1].held_out
    assert first is not None
    assert last is not None
    assert last < 0.9 * first
    assert all(point.held_out is None for point in points[1:-1])
    assert points[-1].tokens == 15 * 4 * 32
    assert all(torch.equal(old, new) for old, new in zip(before, routers(recovery.model), strict=True))
    assert isinstance(recovery.model, MoEForCausalLM)
    assert recovery.evaluate() == pytest.approx(last, abs=1e-5)  # merged
    assert not recovery.model.training
    assert all(parameter.requires_grad for parameter in recovery.model.parameters())  # as before


def test_lora_reaches_every_expert_and_linear_layer_and_merges_exactly() -> None:
    model = carved_model()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recovery = Recovery(model, text(), text(4), options(steps=4))
    for step in range(1, 5):
        recovery._step(step)
    recovery.model.eval()
    with torch.no_grad():
        adapted = recovery.model(input_ids=text(2)).logits
        merged = recovery.model.merge_and_unload()
        assert (merged(input_ids=text(2)).logits - adapted).abs().max() < 1e-5
    for name, tensor in merged.state_dict().items():
        trained = not any(part in name for part in ("norm", "router", "embed", "lm_head"))
        assert torch.equal(tensor, original[name]) != trained, name
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            change_EX = (tensor - original[name]).flatten(1).norm(dim=1)
            assert (change_EX > 0).all()
            ranks = [int(torch.linalg.matrix_rank(rows, tol=1e-4)) for rows in tensor - original[name]]
            assert max(ranks) <= 8


def test_lora_starts_as_the_model_itself() -> None:
    model = carved_model()
    with torch.no_grad():
        before = model(input_ids=text(2)).logits
        assert torch.equal(add_lora(model, 4, 8)(input_ids=text(2)).logits, before)


def logits(model: Any, x_TD: Tensor) -> list[Tensor]:
    return [layer.router(x_TD).logits_TE.detach() for layer in moe_layers(model).values()]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("cancelling", [False, True])
def test_a_step_moves_scores_by_a_share_of_their_spread(mode: str, cancelling: bool) -> None:
    """Also where the weights are far larger than the scores, since they cancel, as those of a fitted gate do."""
    model = carved_model()
    if cancelling:
        for layer in moe_layers(model).values():
            layer.router.weight.data[:, 0] += 100 * EPS  # the same in all experts: it cancels between them
    scales = router_scales(model, list(moe_layers(model).values()), text()[:1])
    x_TD = torch.randn(300, 16)
    before = logits(model, x_TD)
    recovery = Recovery(model, text(), text(4), options(mode=mode, router_lr=0.05, warmup=0.0))
    recovery._step(1)
    for old_TE, new_TE, scale in zip(before, logits(model, x_TD), scales, strict=True):
        moved_T = (new_TE - old_TE).abs().amax(-1)
        most_T = 0.05 * scale.logit_spread * x_TD.abs().sum(-1) / scale.input_sum
        assert (moved_T <= 1.01 * most_T).all()
        assert moved_T.mean() > 0.1 * most_T.mean()


def test_an_ordinary_learning_rate_would_lose_the_routing() -> None:
    """Why it is relative: plain AdamW at 1e-3, in three steps, changes which experts run for most tokens."""
    model, x_TD = carved_model(), torch.randn(200, 16)
    layer = next(iter(moe_layers(model).values()))
    before = layer.router(x_TD).expert_ids_N
    optimizer = torch.optim.AdamW(router_parameters(layer), lr=1e-3)
    for _ in range(3):
        model(input_ids=text(4), labels=text(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = (layer.router(x_TD).expert_ids_N != before).float().mean().item()
    assert plain > 0.4
    other, _ = recover(carved_model(), mode="full", router_lr=0.02, steps=3)
    relative = (next(iter(moe_layers(other.model).values())).router(x_TD).expert_ids_N != before).float().mean().item()
    assert relative < 0.1


def test_vectors_and_gates_of_zeros_move_by_the_rate_itself() -> None:
    model = carved_model(router={"name": "cmoe", "top_k": 2})
    recovery, _ = recover(model, router_lr=0.01, steps=1, warmup=0.0)
    for layer in recovery.layers:
        assert layer.router.scale.abs().max().item() == pytest.approx(0.01, rel=1e-2)
    zeros = carved_model(router={"name": "topk", "top_k": 2})
    for layer in moe_layers(zeros).values():
        layer.router.weight.data.zero_()
    x_TD = torch.randn(100, 16)
    recovery, _ = recover(zeros, router_lr=0.01, steps=1, warmup=0.0)
    for found_TE in logits(recovery.model, x_TD):
        assert 0 < found_TE.abs().max() < 0.1


def test_gradients_of_routers_do_not_shrink_the_others() -> None:
    """They are clipped apart."""
    found = []
    for router_lr in (0.0, 1e-9):
        recovery = Recovery(carved_model(), text(), text(4), options(mode="full", router_lr=router_lr, clip=1e-3))
        recovery._step(1)
        found.append(recovery.model.state_dict()["model.layers.0.mlp.experts.down_proj"])
    assert torch.allclose(*found, atol=1e-6)


def test_a_router_frozen_by_its_config_stays() -> None:
    router = {"name": "topk", "top_k": 1, "renormalize": True, "frozen": True}
    model = carved_model(router=router)
    before = routers(model)
    recovery, _ = recover(model, mode="full", router_lr=0.5, steps=3)
    assert all(torch.equal(old, new) for old, new in zip(before, routers(recovery.model), strict=True))


def test_selection_bias_moves_in_units_of_the_scores() -> None:
    model = carved_model()
    layers = list(moe_layers(model).values())
    spreads = [scale.score_spread for scale in router_scales(model, layers, text()[:1])]
    assert all(0 < spread < EPS for spread in spreads)
    specs = [layer.spec for layer in layers]
    recover(model, balance_rate=0.1, steps=4, lr=1e-5)
    for layer, spread, spec in zip(layers, spreads, specs, strict=True):
        steps_E = layer.router.bias_E / (0.1 * spread)
        assert torch.allclose(steps_E, steps_E.round(), atol=1e-2)
        assert 0 < steps_E.abs().max() <= 4.01
        assert layer.spec == spec
    still, _ = recover(carved_model(), steps=4)
    assert not any(layer.router.bias_E.any() for layer in still.layers)


def test_distillation_brings_the_model_to_its_teacher() -> None:
    torch.manual_seed(5)
    teacher = LlamaForCausalLM(decoder()).eval()
    ends = {}
    for factor in (0.0, 3.0):
        recovery = Recovery(carved_model(), text(), text(4, 1), options(distill=factor, mode="full"), teacher)
        points = recovery.run()
        assert points[-1].distance is not None
        with torch.no_grad():
            pair = [model(input_ids=text(4, 1)).logits.flatten(0, 1) for model in (recovery.model, teacher)]
        ends[factor] = distillation(*pair).item()
    assert ends[3.0] < 0.8 * ends[0.0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_micro_batches_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients before the step: AdamW hides factors."""
    found: list[dict[str, Tensor]] = []
    for micro_batch_size in (None, 2, 1):
        recovery = Recovery(
            carved_model(), text(), text(4), options(mode="full", clip=1e9, micro_batch_size=micro_batch_size)
        )

        def keep(recovery: Recovery = recovery) -> None:
            named = recovery.model.named_parameters()
            found.append({name: p.grad.clone() for name, p in named if p.grad is not None})

        monkeypatch.setattr(recovery._optimizer, "step", keep)
        recovery._step(1)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-6), name


def test_balance_losses_of_the_config_act() -> None:
    """As for an upcycled model: with a large coefficient the routers change otherwise than without."""
    router = {"name": "topk", "top_k": 2}
    ends = []
    for coef in (0.0, 10.0):
        recovery, _ = recover(
            carved_model(router=router, balance={"aux_coef": coef}), mode="full", router_lr=0.2, steps=2
        )
        ends.append(routers(recovery.model)[0])
    assert not torch.allclose(*ends)


def test_same_seed_same_weights() -> None:
    first, second = (recover(carved_model(), steps=3)[0] for _ in range(2))
    other, _ = recover(carved_model(), steps=3, seed=1)
    state = second.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(state[name], other.model.state_dict()[name])


def test_noise_of_routers_has_the_seed_too() -> None:
    """And the process's own random state stays as it was."""
    ends = []
    for state in range(2):
        model = carved_model(router={"name": "noisy_topk", "top_k": 2})
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        recovery, points = recover(model, mode="full", steps=2)
        assert torch.equal(torch.random.get_rng_state(), before)
        ends.append((points[-1].loss, recovery.model.state_dict()["model.layers.0.mlp.experts.down_proj"]))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_learning_rate_rises_and_falls() -> None:
    rates = [lr_factor(options(steps=100, warmup=0.1), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_in_folder_out(tmp_path: Path, dtype: torch.dtype) -> None:
    model = carved_model()
    model.to(dtype).save_pretrained(tmp_path / "carved")
    (tmp_path / "carved" / "README.md").write_text("# carved\n", encoding="utf-8")
    LlamaForCausalLM(decoder()).save_pretrained(tmp_path / "dense")
    seen: list[Point] = []
    result = recover_folder(
        tmp_path / "carved",
        tmp_path / "out",
        text(),
        text(4, 1),
        options(eval_every=5),
        distill=tmp_path / "dense",
        report=seen.append,
        command="moe recover",
    )
    assert [point.step for point in seen if point.held_out is not None] == [0, 5, 10, 15]
    assert result.after < result.before
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stored = ModelFolder(tmp_path / "out")
    assert {stored.read(name).dtype for name in stored.names if "bias_E" not in name} == {dtype}
    assert loaded.model.layers[0].mlp.router.bias_E.dtype == torch.float32
    assert loaded.config.moe == model.config.moe
    again = Recovery(loaded.float(), text(), text(4, 1), options()).evaluate()
    assert math.exp(again) == pytest.approx(result.after, rel=1e-4 if dtype == torch.float32 else 0.05)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# carved\n")
    assert "## Recovery training" in card
    assert "moe recover" in card
    assert not list(tmp_path.glob(".*"))


def test_a_last_step_that_breaks_the_model_is_an_error() -> None:
    """There is no next loss to tell; the held-out text does."""
    model = carved_model()
    model.get_parameter("model.layers.0.mlp.experts.down_proj").register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(ValueError, match=r"the held-out loss after step 1 is nan; lower recover\.lr"):
        recover(model, mode="full", steps=1)


def test_mistakes_are_named(tmp_path: Path) -> None:
    LlamaForCausalLM(decoder()).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="moe import"):
        recover_folder(tmp_path / "dense", tmp_path / "out", text(), text(), options())
    with pytest.raises(ValueError, match="no MoE layers"):
        Recovery(LlamaForCausalLM(decoder()), text(), text(), options())
    small = decoder()
    small.vocab_size = 20
    with pytest.raises(ValueError, match="vocabulary of 20"):
        Recovery(carved_model(), text(), text(), options(), LlamaForCausalLM(small))
    with pytest.raises(ValueError, match=r"the loss of step \d is nan; lower recover\.lr"):
        recover(carved_model(), mode="full", lr=1e30, clip=1e30, warmup=0.0, steps=5)
    for field, value in (("mode", "half"), ("steps", 0), ("lr", 0.0), ("micro_batch_size", 3), ("router_lr", -1.0)):
        with pytest.raises(ValueError, match=rf"recover\.({field}|batch_size)="):
            replace(options(), **{field: value})
