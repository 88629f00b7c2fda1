"""Soft MoE: its formula with all gradients, its groups, slots and scale."""

import math
import warnings

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import assert_same_gradients, gradients, make_layer
from helpers.routing import make_router
from helpers.soft import check_soft_routing, group_lists, mixture_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.observe import RoutingContext
from moe.types import TokenInfo

D, E = 6, 4


def unit(v_RD: Tensor) -> Tensor:
    return v_RD / (v_RD.square().sum(-1, keepdim=True) + 1e-6).sqrt()


pytestmark = pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups here are small


def info(num_sequences: int, keep_T: Tensor | None = None) -> TokenInfo:
    return TokenInfo(num_sequences=num_sequences, keep_T=keep_T)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_layer_against_the_loop(group: str, normalize: bool, padded: bool) -> None:
    """5 sequences of 3 tokens, in position groups of 2, 2 and 1."""
    keep_T = torch.rand(15) < 0.6 if padded else None
    if keep_T is not None:
        keep_T[:3] = False  # a sequence of padding alone
    context = RoutingContext()
    context.token_mask_T = keep_T
    options = {"name": "soft", "group": group, "group_size": 2, "slots_per_expert": 2, "normalize": normalize}
    layer = make_layer(D, context=context, router=options)
    if normalize:
        layer.router.scale.data.fill_(1.7)
    x, dy = torch.randn(5, 3, D, requires_grad=True), torch.randn(5, 3, D)
    y = layer(x)
    y.backward(dy)

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64_TD = x.detach().double().view(15, D).requires_grad_()
    weight_SD = p["router.weight"]
    logits_TS = x64_TD @ weight_SD.T
    if normalize:
        logits_TS = p["router.scale"] * unit(x64_TD) @ unit(weight_SD).T
    keep = [True] * 15 if keep_T is None else keep_T.tolist()
    expected_TD = mixture_layer(
        x64_TD,
        logits_TS,
        group_lists(5, 3, group, 2),
        keep,
        "slots",
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
    )
    expected_TD.backward(dy.view(15, D).double())
    assert_close("y", y.view(15, D), expected_TD, torch.float32)
    got = gradients(layer, x)
    got["x"] = got["x"].view(15, D)
    assert_same_gradients(got, {"x": x64_TD.grad} | {name: value.grad for name, value in p.items()})


def test_zero_logits_mix_evenly() -> None:
    router = make_router(D, E, name="soft", slots_per_expert=3)
    router.weight.data.zero_()
    routing = router(torch.randn(10, D), info(2))
    assert torch.equal(routing.dispatch_GMS, torch.full((2, 5, 12), 1 / 5))
    torch.testing.assert_close(routing.combine_GMS, torch.full((2, 5, 12), 1 / 12))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_sequences=st.integers(1, 5),
    length=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group=st.sampled_from(["sequence", "position"]),
    normalize=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_promises_of_soft_routing(
    num_sequences: int,
    length: int,
    scale: float,
    dtype: torch.dtype,
    group: str,
    normalize: bool,
    padded: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_tokens = num_sequences * length
    options = {"group": group, "normalize": normalize, "group_size": 3, "slots_per_expert": 2}
    router = make_router(8, 4, name="soft", **options)
    router.weight.data.copy_(torch.eye(8))  # without norms the input is the logits
    x_TD = (scale * torch.randn(num_tokens, 8)).to(dtype).requires_grad_()
    keep_T = torch.rand(num_tokens) < 0.6 if padded else None
    routing = router(x_TD, info(num_sequences, keep_T))
    check_soft_routing(routing, [True] * num_tokens if keep_T is None else keep_T.tolist(), 4)
    (routing.dispatch_GMS.square().sum() + routing.combine_GMS.square().sum()).backward()
    for tensor in (x_TD, *router.parameters()):
        assert tensor.grad.isfinite().all()


def test_permuting_the_tokens_permutes_the_result() -> None:
    layer = make_layer(D, router={"name": "soft", "slots_per_expert": 2})
    x, order = torch.randn(2, 7, D), torch.randperm(7)
    assert_close("y", layer(x[:, order]), layer(x)[:, order], torch.float32)
    assert not torch.allclose(layer(x[:, order]), layer(x), atol=1e-3)


@pytest.mark.parametrize("group", ["sequence", "position"])
def test_groups_do_not_see_each_other(group: str) -> None:
    layer = make_layer(D, router={"name": "soft", "group": group, "group_size": 2}).eval()
    x = torch.randn(4, 3, D)
    before = layer(x)
    x[1, 2] += 1
    changed_BL = (layer(x) != before).any(-1)
    expected_BL = torch.zeros(4, 3, dtype=torch.bool)
    if group == "sequence":
        expected_BL[1] = True
    else:
        expected_BL[:2, 2] = True
    assert torch.equal(changed_BL, expected_BL)


def test_padding_is_as_if_it_were_not_there() -> None:
    layer = make_layer(D, context=(context := RoutingContext()), router={"name": "soft", "slots_per_expert": 2})
    x = torch.randn(1, 7, D)
    alone = layer(x[:, 3:])
    context.token_mask_T = torch.tensor([False] * 3 + [True] * 4)
    padded = layer(x)
    assert_close("y", padded[:, 3:], alone, torch.float32)
    assert not padded[:, :3].any()
    x[:, 0] += 100
    assert torch.equal(layer(x), padded)


def test_the_scale_learns_and_sharpens() -> None:
    router = make_router(D, E, name="soft")
    x_TD = torch.randn(9, D)
    assert router.scale.item() == 1
    routing = router(x_TD)
    assert routing.logits_TE.abs().max() < 1 + math.log(router.slots_per_expert), "logits are cosines"
    routing.dispatch_GMS.square().sum().backward()
    assert router.scale.grad.abs() > 1e-3
    router.scale.data.fill_(50.0)
    assert router(x_TD).combine_GMS.max() > 2 * routing.combine_GMS.max()


def test_the_size_of_vectors_does_not_matter_when_normalised() -> None:
    x_TD = torch.randn(9, D)
    for normalize in (True, False):
        router = make_router(D, E, name="soft", normalize=normalize)
        first, second = router(x_TD), router(20 * x_TD)
        router.weight.data.mul_(3)
        third = router(x_TD)
        for other in (second, third):
            assert torch.allclose(first.combine_GMS, other.combine_GMS, atol=1e-4) == normalize
        assert ("scale" in router.state_dict()) == normalize


@pytest.mark.parametrize(
    ("options", "per_expert", "mean"),
    [
        ({"group_size": 8, "capacity_factor": 1.0}, 2, 1.0),  # m=8, E=4
        ({"group_size": 9, "capacity_factor": 1.0}, 2, 8 / 9),
        ({"group_size": 10, "capacity_factor": 1.0}, 3, 1.2),
        ({"group_size": 1, "capacity_factor": 0.5}, 1, 4.0),
        ({"group_size": 196, "slots_per_expert": 1, "capacity_factor": 9.0}, 1, 4 / 196),
    ],
    ids=str,
)
def test_slots(options: dict, per_expert: int, mean: float) -> None:
    router = make_router(D, E, name="soft", **options)
    assert router.weight.shape == (E * per_expert, D)
    assert router.mean_experts_per_token == pytest.approx(mean)
    routing = router(torch.randn(options["group_size"], D))
    assert routing.dispatch_GMS.shape[-1] / options["group_size"] == pytest.approx(mean)


def test_probabilities_of_experts_are_sums_over_their_slots() -> None:
    router = make_router(D, E, name="soft", slots_per_expert=3, group_size=2, group="position")
    routing = router(torch.randn(15, D), info(5))
    assert routing.token_ids_GM.shape == (9, 2)
    for g, m in [(0, 0), (4, 1), (8, 0)]:
        token = routing.token_ids_GM[g, m]
        expected_E = routing.combine_GMS[g, m].view(E, 3).sum(-1)
        torch.testing.assert_close(routing.probs_TE[token], expected_E)


def test_decisions_are_taken_in_fp32_and_alike_in_evaluation() -> None:
    router = make_router(32, E, name="soft")
    x_TD = torch.randn(40, 32).bfloat16()
    expected = router(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x_TD)
    for routing in (router(x_TD), autocast, router.eval()(x_TD)):
        assert torch.equal(routing.dispatch_GMS, expected.dispatch_GMS)
        assert torch.equal(routing.combine_GMS, expected.combine_GMS)


def test_initialisation_is_of_its_own_size() -> None:
    router = make_router(400, E, name="soft")
    router.scale.data.fill_(7.0)
    router.reset_parameters(0.9)
    assert router.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert router.scale.item() == 1


def test_only_position_groups_are_causal() -> None:
    problem = make_router(D, E, name="soft").causal_problem()
    assert problem is not None
    assert "'soft' with router.group='sequence' looks at later tokens" in problem
    assert "set router.group=position" in problem
    assert make_router(D, E, name="soft", group="position").causal_problem() is None


def test_too_many_slots_for_the_batch_are_told_of() -> None:
    router = make_router(D, E, name="soft", group="position", group_size=16)
    with pytest.warns(UserWarning, match=r"'soft' evaluates 4 experts per token .* ask for 1, .* groups have 4 tokens"):
        router(torch.randn(8, D), info(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(torch.randn(32, D), info(16))
        router.eval()(torch.randn(8, D), info(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "batch"}, r"router.group='batch' is unknown; use one of 'sequence', 'position'"),
        ({"group_size": 0}, r"router.group_size=0 must be at least 1"),
        ({"capacity_factor": 0.0}, r"router.capacity_factor=0.0 must be positive"),
        ({"slots_per_expert": 0}, r"router.slots_per_expert=0 must be at least 1, or null"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(D, E, name="soft", **options)
