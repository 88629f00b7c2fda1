"""No router lets a causal model see what it has to predict: refused where it would, checked through whole models otherwise.

Legend: B sequences, L their length, V vocabulary.
"""

from typing import Any

import pytest
import torch
from models.tiny import layers_of, make_model, tokens
from torch import Tensor

from moe.models import MoEForCausalLM
from moe.routers import ROUTERS, Router

# Options with which a causal model takes a router that it refuses by default.
ACCEPTED: dict[str, dict[str, Any]] = {
    "soft": {"group": "position", "group_size": 3},
    "sinkhorn": {"accept_leak": True},
}
# Training looks ahead although the model takes it, because the user said so.
LEAKS_IN_TRAINING = {"sinkhorn": "router.accept_leak=true: its assignment sees the whole batch, in training only"}
# A token's result depends on the tokens at the same position of other sequences.
BY_POSITION: dict[str, dict[str, Any]] = {
    "soft": {"group": "position", "group_size": 3},
    "mixture_of_tokens": {"group_size": 3},
    "expert_choice": {"group_size": 3, "capacity": 2.0},
}
# Groups that hold several tokens of a sequence, with the mode in which they are read.
LEAKY: list[tuple[str, dict[str, Any], bool]] = [
    ("soft", {}, False),
    ("expert_choice", {"group": "batch"}, False),
    ("expert_choice", {"group": "sequence"}, False),
    ("sinkhorn", {}, True),
    ("sinkhorn", {"group": "sequence"}, True),
    ("sinkhorn", {"assignment": "optimal"}, True),
]
B, L = 5, 12
ROW, START = 1, 8  # the sequence that is perturbed, and the first position of it
pytestmark = pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups here are small


def model_with(name: str, options: dict[str, Any], training: bool) -> MoEForCausalLM:
    """A tiny model whose gates are far from even, whatever the router's own initialisation."""
    model = make_model(router={"name": name, **options}).train(training)
    with torch.no_grad():
        for layer in layers_of(model):
            for parameter in layer.router.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.0)
    return model


def logits(model: MoEForCausalLM, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        return model(ids_BL, attention_mask=mask_BL).logits


def changes(model: MoEForCausalLM) -> Tensor:
    """(B, L) by how much logits change at most with the end of one sequence, from `START` on, over several other ends."""
    ids_BL = tokens(B, L)
    before, found = logits(model, ids_BL), []
    for seed in range(8):
        other_BL = ids_BL.clone()
        other_BL[ROW, START:] = tokens(1, L - START, seed=50 + seed)
        found.append((logits(model, other_BL) - before).abs().amax(-1))
    return torch.stack(found).amax(0)


@pytest.mark.parametrize(("name", "options", "training"), LEAKY, ids=str)
def test_models_refuse_routers_that_look_ahead(name: str, options: dict[str, Any], training: bool) -> None:
    fixes = ["set router.group=position"] + ["router.accept_leak=true"] * (name == "sinkhorn")
    with pytest.raises(ValueError, match=f"router {name!r} with router.group=.* looks at later tokens") as refusal:
        make_model(router={"name": name, **options})
    for fix in fixes:
        assert fix in str(refusal.value)
        option, _, value = fix.removeprefix("set ").removeprefix("router.").partition("=")
        make_model(router={"name": name, **options, option: {"true": True}.get(value, value)})


@pytest.mark.parametrize(("name", "options", "training"), LEAKY, ids=str)
def test_what_is_refused_would_leak(
    name: str, options: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests below are known to see a leak."""
    monkeypatch.setattr(ROUTERS[name], "causal_problem", Router.causal_problem)
    changes_BL = changes(model_with(name, options, training))
    assert changes_BL[ROW, :START].max() > 1e-2


def test_every_router_can_be_had_in_a_causal_model() -> None:
    for name, router_class in ROUTERS.items():
        make_model(router={"name": name, **ACCEPTED.get(name, {})})
        if name in ACCEPTED:
            router = router_class(8, 4, router_class.Config())
            assert router.causal_problem() is not None, f"{name} needs no entry"


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", list(ROUTERS))
def test_the_end_of_a_sequence_changes_nothing_before_it(name: str, training: bool) -> None:
    """Of its own sequence, nor of another; in evaluation no other sequence at all, but for groups by position."""
    if training and name in LEAKS_IN_TRAINING:
        pytest.skip(f"{name}: {LEAKS_IN_TRAINING[name]}")
    changes_BL = changes(model_with(name, ACCEPTED.get(name, {}), training))
    # Rows per expert change with the routing, and sums of floats with them.
    assert changes_BL[:, :START].max() < 1e-4
    assert changes_BL[ROW, START:].min() > 1e-2
    if name not in BY_POSITION and not training:
        assert changes_BL[[b for b in range(B) if b != ROW]].max() < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "options"), BY_POSITION.items())
def test_groups_by_position_mix_sequences(name: str, options: dict[str, Any], training: bool) -> None:
    """At the same position of the same group, sequences 0 to 2, and from there on through attention."""
    changes_BL = changes(model_with(name, options, training))
    assert changes_BL[:3].amax(1).min() > 1e-2
    assert changes_BL[:, :START].max() < 1e-4
    assert changes_BL[3:].max() < 1e-4


def test_groups_by_position_make_sinkhorn_safe_in_training() -> None:
    changes_BL = changes(model_with("sinkhorn", {"group": "position", "group_size": 3}, training=True))
    assert changes_BL[:, :START].max() < 1e-4
    assert changes_BL[[0, 2]].max() > 1e-2
    assert changes_BL[3:].max() < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("name", "options"), [*BY_POSITION.items(), ("sinkhorn", {"group": "position", "group_size": 3})]
)
def test_padding_does_not_enter_groups(name: str, options: dict[str, Any], training: bool) -> None:
    """Prompts of several lengths, padded on the left: what stands under the mask changes no logits of the prompts."""
    model, ids_BL = model_with(name, options, training), tokens(B, L)
    mask_BL = torch.arange(L) >= torch.tensor([5, 0, 3, 8, 1])[:, None]
    before, after = (logits(model, ids_BL.masked_fill(~mask_BL, filler), mask_BL.long()) for filler in (0, 33))
    assert (before - after).abs()[mask_BL].max() < 1e-4
    unmasked = logits(model, ids_BL.masked_fill(~mask_BL, 33))
    if not (name == "sinkhorn" and not training):  # which looks at no other token then
        assert (unmasked - before).abs()[mask_BL].max() > 1e-2


@pytest.mark.parametrize(("name", "options"), BY_POSITION.items())
def test_a_cache_changes_no_groups(name: str, options: dict[str, Any]) -> None:
    """A step of generation groups the prompts as the whole text does at that position; short groups included."""
    model, prompt_BL = model_with(name, options, training=False), tokens(B, 4)
    mask_BL = torch.arange(4) >= torch.tensor([2, 0, 1, 0, 3])[:, None]
    found = [
        model.generate(
            prompt_BL.masked_fill(~mask_BL, 0),
            attention_mask=mask_BL.long(),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


def test_a_prompt_alone_is_generated_from() -> None:
    """A group of one: no error, and after the transition of Mixture of Tokens no dependence on the batch either."""
    prompts = tokens(3, 4)
    for name, options in BY_POSITION.items():
        text = model_with(name, options, training=False).generate(prompts[:1], max_new_tokens=3, do_sample=False)
        assert text.shape == (1, 7)
    model = model_with("mixture_of_tokens", {"group_size": 3, "sparse_after": 0, "sparse_top_k": 2}, training=False)
    together = model.generate(prompts, max_new_tokens=6, do_sample=False)
    for row in range(3):
        assert torch.equal(model.generate(prompts[row : row + 1], max_new_tokens=6, do_sample=False)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), [*BY_POSITION.items(), ("sinkhorn", {"group": "position"})])
def test_training_step(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss and gradients of every parameter, with padding."""
    model, ids_BL = model_with(name, options, training=True).to(dtype), tokens(B, L)
    mask_BL = torch.arange(L) >= torch.tensor([5, 0, 3, 8, 1])[:, None]
    loss = model(ids_BL, attention_mask=mask_BL.long(), labels=ids_BL.masked_fill(~mask_BL, -100)).loss
    loss.backward()
    assert loss.isfinite()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
