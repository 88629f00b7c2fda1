"""Mixture of Tokens: its formula with all gradients, temperature, groups, and the transition to sparse."""

import warnings

import pytest
import torch
from helpers import oracles
from helpers.close import assert_close
from helpers.layer_oracle import assert_same_gradients, gradients, make_layer
from helpers.routing import check_routing, make_router
from helpers.soft import check_soft_routing, group_lists, mixture_layer, softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.observe import RoutingContext
from moe.routers.base import StepLoad
from moe.types import Routing, SoftRouting, TokenInfo

D, E = 6, 4
pytestmark = pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups here are small
LOAD = StepLoad(counts_E=torch.zeros(E, dtype=torch.int64), model_density=None, reduce=lambda tensor: tensor)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.3}, {"temperature": 2.0, "learn_temperature": True}, {"emit": "experts"}],
    ids=str,
)
def test_layer_against_the_loop(options: dict, padded: bool) -> None:
    """5 sequences of 3 tokens, in groups of 2, 2 and 1."""
    keep_T = torch.rand(15) < 0.6 if padded else None
    if keep_T is not None:
        keep_T[:6:3] = False  # a group of padding alone
    context = RoutingContext()
    context.token_mask_T = keep_T
    layer = make_layer(D, context=context, router={"name": "mixture_of_tokens", "group_size": 2} | options)
    temperature = options.get("temperature", 1.0)
    if "learn_temperature" in options:
        layer.router.log_temperature.data.fill_(0.4)
    x, dy = torch.randn(5, 3, D, requires_grad=True), torch.randn(5, 3, D)
    y = layer(x)
    y.backward(dy)

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64_TD = x.detach().double().view(15, D).requires_grad_()
    if "learn_temperature" in options:
        temperature = 2.0 * torch.exp(p["router.log_temperature"])
    expected_TD = mixture_layer(
        x64_TD,
        x64_TD @ p["router.weight"].T / temperature,
        group_lists(5, 3, "position", 2),
        [True] * 15 if keep_T is None else keep_T.tolist(),
        "slots" if options.get("emit") == "experts" else "merge",
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
    )
    expected_TD.backward(dy.view(15, D).double())
    assert_close("y", y.view(15, D), expected_TD, torch.float32)
    got = gradients(layer, x)
    got["x"] = got["x"].view(15, D)
    assert_same_gradients(got, {"x": x64_TD.grad} | {name: value.grad for name, value in p.items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_sequences=st.integers(1, 5),
    length=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    emit=st.sampled_from(["merge", "experts"]),
    padded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_promises_of_soft_routing(
    num_sequences: int, length: int, scale: float, dtype: torch.dtype, emit: str, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    num_tokens = num_sequences * length
    options = {"group_size": 3, "learn_temperature": True, "emit": emit}
    router = make_router(E, E, logits=True, name="mixture_of_tokens", **options)
    x_TD = (scale * torch.randn(num_tokens, E)).to(dtype).requires_grad_()
    keep_T = torch.rand(num_tokens) < 0.6 if padded else None
    routing = router(x_TD, TokenInfo(num_sequences=num_sequences, keep_T=keep_T))
    if emit == "experts":
        check_soft_routing(routing, [True] * num_tokens if keep_T is None else keep_T.tolist(), E)
    else:
        assert torch.equal(routing.dispatch_GMS, routing.combine_GMS)
    (routing.dispatch_GMS.square().sum() + routing.combine_GMS.square().sum()).backward()
    for tensor in (x_TD, *router.parameters()):
        assert tensor.grad.isfinite().all()


def test_a_token_is_mixed_with_those_at_its_position_only() -> None:
    layer = make_layer(D, router={"name": "mixture_of_tokens", "group_size": 3}).eval()
    x = torch.randn(5, 4, D)
    before = layer(x)
    x[3, 1] += 1
    changed_BL = (layer(x) != before).any(-1)
    expected_BL = torch.zeros(5, 4, dtype=torch.bool)
    expected_BL[3:, 1] = True  # groups of sequences 0-2 and 3-4
    assert torch.equal(changed_BL, expected_BL)


def test_lower_temperature_picks_one_token() -> None:
    x_TD = torch.randn(8, D)
    info = TokenInfo(num_sequences=8)
    cold, warm = (make_router(D, E, name="mixture_of_tokens", temperature=t) for t in (1e-3, 1e3))
    cold.load_state_dict(warm.state_dict())
    best_E = (x_TD @ cold.weight.T).argmax(0)
    assert cold(x_TD, info).dispatch_GMS[0].argmax(0).tolist() == best_E.tolist()
    assert cold(x_TD, info).dispatch_GMS[0].amax(0).min() > 0.9
    torch.testing.assert_close(warm(x_TD, info).dispatch_GMS, torch.full((1, 8, E), 1 / 8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_sparse_phase_against_the_loop(top_k: int) -> None:
    """Not renormalised for K = 1, which would leave the gate without gradient; the temperature plays no part."""
    options = {"sparse_after": 0, "sparse_top_k": top_k, "temperature": 0.1}
    router = make_router(D, E, name="mixture_of_tokens", **options)
    x_TD, upstream_N = torch.randn(9, D, requires_grad=True), torch.randn(9 * top_k)
    routing = router(x_TD, TokenInfo(num_sequences=3))
    check_routing(routing, 9, E)
    routing.weights_N.backward(upstream_N)
    x64_TD, weight_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, router.weight))
    ids, weights_N = oracles.softmax_topk(x64_TD @ weight_ED.T, top_k, top_k > 1)
    weights_N.backward(upstream_N.double())
    assert routing.expert_ids_N.tolist() == ids
    assert_close("weights", routing.weights_N, weights_N, torch.float32)
    assert_close("dweight", router.weight.grad, weight_ED.grad, torch.float32)
    assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gate_loads_into_topk(top_k: int) -> None:
    router = make_router(D, E, name="mixture_of_tokens", sparse_after=0, sparse_top_k=top_k)
    other = make_router(D, E, name="topk", top_k=top_k, renormalize=top_k > 1)
    missing, unexpected = other.load_state_dict(router.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["steps"])
    x_TD = torch.randn(20, D)
    ours, theirs = router(x_TD), other(x_TD)
    assert torch.equal(ours.expert_ids_N, theirs.expert_ids_N)
    assert torch.equal(ours.weights_N, theirs.weights_N)


def test_transition_after_so_many_steps() -> None:
    layer = make_layer(D, router={"name": "mixture_of_tokens", "group_size": 4, "sparse_after": 2, "sparse_top_k": 2})
    x, kinds, means = torch.randn(4, 3, D, requires_grad=True), [], []
    for _ in range(4):
        layer(x).sum().backward()
        kinds.append(type(layer.router(x.view(12, D), TokenInfo(num_sequences=4))))
        means.append(layer.router.mean_experts_per_token)
        layer.finish_step()
    assert kinds == [SoftRouting, SoftRouting, Routing, Routing]
    assert means == [1, 1, 2, 2]
    resumed = make_layer(D, router=layer.spec.router)
    resumed.load_state_dict(layer.state_dict())
    assert resumed.router.is_sparse
    resumed.reset_parameters(0.1)
    assert not resumed.router.is_sparse


def test_no_transition_unless_asked_for() -> None:
    router = make_router(D, E, name="mixture_of_tokens", group_size=8)
    for _ in range(3):
        router.after_step(LOAD)
    assert not router.is_sparse
    assert router.mean_experts_per_token == E / 8
    with torch.device("meta"):  # as specs are checked
        assert not make_router(D, E, name="mixture_of_tokens", sparse_after=5).is_sparse
        assert make_router(D, E, name="mixture_of_tokens", sparse_after=0, sparse_top_k=3).mean_experts_per_token == 3


def test_a_prompt_alone_passes_every_expert() -> None:
    """A group of one is weighted 1 everywhere, which is why generation needs a batch, or the transition."""
    layer = make_layer(D, router={"name": "mixture_of_tokens"}).eval()
    x_TD = torch.randn(3, D)
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    expected_TD = oracles.expert_ffn(
        x_TD.double(),
        [t for t in range(3) for _ in range(E)],
        list(range(E)) * 3,
        torch.ones(3 * E, dtype=torch.float64),
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
        "swiglu",
    )
    assert_close("y", layer(x_TD[None]), expected_TD[None], torch.float32)


def test_logits_are_clean_and_probabilities_are_over_experts() -> None:
    router = make_router(E, E, logits=True, name="mixture_of_tokens", temperature=0.2)
    x_TD = torch.randn(6, E)
    routing = router(x_TD, TokenInfo(num_sequences=2))
    assert torch.equal(routing.logits_TE, x_TD)
    expected = softmax(list(x_TD[3].double()))
    torch.testing.assert_close(routing.probs_TE[3].double(), torch.stack(expected), atol=1e-6, rtol=0)


def test_small_batches_are_told_of() -> None:
    router = make_router(D, E, name="mixture_of_tokens", group_size=8)
    with pytest.warns(UserWarning, match=r"evaluates 2 experts per token where its options ask for 0.5"):
        router(torch.randn(6, D), TokenInfo(num_sequences=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(torch.randn(18, D), TokenInfo(num_sequences=9))
        router.eval()(torch.randn(6, D), TokenInfo(num_sequences=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, r"router.group_size=0 must be at least 1"),
        ({"temperature": 0.0}, r"router.temperature=0.0 must be positive"),
        ({"emit": "tokens"}, r"router.emit='tokens' is unknown; use 'merge' or 'experts'"),
        ({"sparse_after": -1}, r"router.sparse_after=-1 must be a number of steps, or null"),
        ({"sparse_top_k": 0}, r"router.sparse_top_k=0 must be at least 1"),
        ({"sparse_top_k": 5}, r"router.sparse_top_k=5 is more than num_experts=4"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(D, E, name="mixture_of_tokens", **options)
