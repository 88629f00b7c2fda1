"""Balanced assignments: Sinkhorn's plan, the exact assignment against brute force, and the router around them."""

import itertools

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import make_layer
from helpers.routing import check_routing, make_router
from helpers.soft import group_lists
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.routers.assignment import balanced_assignment, sinkhorn_prices
from moe.routers.balance import BalanceConfig
from moe.types import Routing, TokenInfo

D, E = 5, 4


def loads(expert_ids_T: Tensor, num_experts: int) -> list[int]:
    return torch.bincount(expert_ids_T, minlength=num_experts).tolist()


def total(scores_TE: Tensor, expert_ids: list[int]) -> float:
    return sum(scores_TE[t, e].item() for t, e in enumerate(expert_ids))


def info(num_sequences: int, keep_T: Tensor | None = None) -> TokenInfo:
    return TokenInfo(num_sequences=num_sequences, keep_T=keep_T)


# ---- Sinkhorn


@pytest.mark.parametrize(("num_rows", "num_experts"), [(40, 4), (5, 8), (64, 16)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_plan_has_the_right_sums(num_rows: int, num_experts: int, scale: float) -> None:
    logits_GME = scale * torch.randn(3, num_rows, num_experts)
    prices_G1E = sinkhorn_prices(logits_GME, tolerance=1e-5, max_iterations=3000)
    plan_GME = (logits_GME - prices_G1E).softmax(-1) / num_rows
    torch.testing.assert_close(plan_GME.sum(2), torch.full((3, num_rows), 1 / num_rows))
    torch.testing.assert_close(plan_GME.sum(1), torch.full((3, num_experts), 1 / num_experts), atol=0, rtol=2e-5)
    # It is a scaling of rows and columns: log P - logits is a column vector plus a row vector.
    rest_GME = plan_GME.double().log() - logits_GME
    centred_GME = rest_GME - rest_GME.mean(1, keepdim=True) - rest_GME.mean(2, keepdim=True)
    assert (centred_GME + rest_GME.mean((1, 2), keepdim=True)).abs().max() < 1e-4


def test_as_the_iteration_on_plain_exponentials() -> None:
    """d0 = 1 / (T A d1), d1 = 1 / (E A^T d0), alternately, a fixed number of times; in float64."""
    logits_TE = 2 * torch.randn(30, E)
    a_TE = logits_TE.double().exp()
    d1_E = torch.ones(E, dtype=torch.float64)
    for _ in range(7):
        d0_T = 1 / (30 * (a_TE @ d1_E))
        d1_E = 1 / (E * (a_TE.T @ d0_T))
    prices_E = sinkhorn_prices(logits_TE[None], tolerance=1e-30, max_iterations=7).view(-1)
    torch.testing.assert_close(prices_E.double(), -d1_E.log(), atol=1e-5, rtol=0)


def test_tolerance_and_iterations_bound_the_work() -> None:
    logits_GME = 5 * torch.randn(1, 60, E) + torch.arange(E) * 3
    errors = []
    for max_iterations in (1, 5, 50):
        prices_G1E = sinkhorn_prices(logits_GME, tolerance=1e-6, max_iterations=max_iterations)
        shares_E = (logits_GME - prices_G1E).softmax(-1).mean((0, 1))
        errors.append((shares_E * E - 1).abs().max().item())
    assert errors[0] > errors[1] > 10 * errors[2]
    for tolerance in (1e-1, 1e-3):
        prices_G1E = sinkhorn_prices(logits_GME, tolerance=tolerance, max_iterations=1000)
        shares_E = (logits_GME - prices_G1E).softmax(-1).mean((0, 1))
        assert tolerance / 100 < (shares_E * E - 1).abs().max() < tolerance


def test_rows_that_are_not_real_do_not_count() -> None:
    logits_GME, real_GM = torch.randn(3, 9, E), torch.rand(3, 9) < 0.5
    real_GM[1] = False
    real_GM[2] = True
    prices_G1E = sinkhorn_prices(logits_GME, real_GM)
    for g in (0, 2):
        alone_11E = sinkhorn_prices(logits_GME[g, real_GM[g]][None])
        torch.testing.assert_close(prices_G1E[g], alone_11E[0], atol=1e-3, rtol=0)
    assert prices_G1E.isfinite().all()


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_prices_stay_finite(num_rows: int, scale: float) -> None:
    logits_GME = scale * torch.randn(2, num_rows, E)
    prices_G1E = sinkhorn_prices(logits_GME)
    assert prices_G1E.shape == (2, 1, E)
    assert prices_G1E.isfinite().all()
    if scale == 0:
        torch.testing.assert_close(prices_G1E, torch.zeros(2, 1, E))


# ---- exact assignment


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 7),
    num_experts=st.integers(1, 4),
    kind=st.sampled_from(["normal", "whole", "skewed", "huge", "equal", "copies"]),
    seed=st.integers(0, 2**20),
)
def test_best_of_all_balanced_assignments(num_tokens: int, num_experts: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(num_tokens, num_experts, generator=generator)
    if kind == "whole":
        scores_TE = (scores_TE * 2).round()
    elif kind == "skewed":
        scores_TE = scores_TE + 10 * torch.arange(num_experts)
    elif kind == "huge":
        scores_TE = 1e4 * scores_TE
    elif kind == "equal":
        scores_TE = torch.zeros_like(scores_TE)
    elif kind == "copies" and num_tokens:
        scores_TE = scores_TE[torch.randint(0, min(2, num_tokens), (num_tokens,), generator=generator)]
    found_T = balanced_assignment(scores_TE)
    floor, ceil = num_tokens // num_experts, -(-num_tokens // num_experts)
    allowed = [
        choice
        for choice in itertools.product(range(num_experts), repeat=num_tokens)
        if all(floor <= choice.count(e) <= ceil for e in range(num_experts))
    ]
    assert tuple(found_T.tolist()) in allowed
    best = max(total(scores_TE, choice) for choice in allowed)
    assert total(scores_TE, found_T.tolist()) >= best - 1e-6 * scores_TE.abs().sum().item()


@pytest.mark.parametrize("kind", ["normal", "skewed", "outlier", "copies", "equal"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(512, 8), (300, 7), (96, 32)])
def test_no_exchange_of_tokens_gains(num_tokens: int, num_experts: int, kind: str) -> None:
    """At sizes beyond brute force: the cheapest way around any cycle of experts costs something (Floyd-Warshall)."""
    scores_TE = torch.randn(num_tokens, num_experts)
    if kind == "skewed":
        scores_TE += 5 * torch.randn(num_experts)
    elif kind == "outlier":
        scores_TE[0, 0] = 1e3
    elif kind == "copies":
        scores_TE = scores_TE[torch.randint(0, 20, (num_tokens,))]
    elif kind == "equal":
        scores_TE.zero_()
    found_T = balanced_assignment(scores_TE)
    found = loads(found_T, num_experts)
    assert max(found) - min(found) == (num_tokens % num_experts > 0)

    # Another node, "outside", trades places: experts with one token more than others may hand one on for nothing.
    cost = [[float("inf")] * (num_experts + 1) for _ in range(num_experts + 1)]
    scores, experts = scores_TE.double().tolist(), found_T.tolist()
    for t, here in enumerate(experts):
        for there in range(num_experts):
            if there != here:
                cost[here][there] = min(cost[here][there], scores[t][here] - scores[t][there])
    for e in range(num_experts):
        if found[e] < max(found):
            cost[e][num_experts] = 0.0
        elif max(found) > min(found):
            cost[num_experts][e] = 0.0
    path_EE = torch.tensor(cost, dtype=torch.float64)
    for middle in range(num_experts + 1):
        path_EE = torch.minimum(path_EE, path_EE[:, middle : middle + 1] + path_EE[middle : middle + 1])
    assert path_EE.diagonal().min() > -1e-6


def test_a_swap_that_would_gain_is_noticed() -> None:
    """The greedy way, each token in turn to its best expert with room, is not optimal here."""
    scores_TE = torch.tensor([[3.0, 2.9], [5.0, 0.0]])
    assert balanced_assignment(scores_TE).tolist() == [1, 0]


# ---- the router


@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
def test_optimal_groups(group: str) -> None:
    """Every group is assigned by itself; padding takes no room."""
    router = make_router(E, E, logits=True, name="sinkhorn", assignment="optimal", group=group, group_size=8)
    x_TD, keep_T = torch.randn(54, E) + 3 * torch.arange(E), torch.rand(54) < 0.8
    routing = router(x_TD, info(9, keep_T))
    check_routing(routing, 54, E)
    for tokens in group_lists(9, 6, group, 8):
        real = [t for t in tokens if keep_T[t]]
        found = loads(routing.expert_ids_N[real], E)
        assert max(found) - min(found) <= 1
        assert routing.expert_ids_N[real].tolist() == balanced_assignment(x_TD[real]).tolist()


@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_groups(group: str, top_k: int) -> None:
    router = make_router(E, E, logits=True, name="sinkhorn", top_k=top_k, group=group, group_size=8)
    x_TD, keep_T = torch.randn(54, E), torch.rand(54) < 0.8
    routing = router(x_TD, info(9, keep_T))
    check_routing(routing, 54, E)
    for tokens in group_lists(9, 6, group, 8):
        real = [t for t in tokens if keep_T[t]]
        prices_11E = sinkhorn_prices(x_TD[real][None])
        expected_TK = (x_TD[real] - prices_11E[0]).topk(top_k).indices
        assert torch.equal(routing.expert_ids_N.view(54, top_k)[real], expected_TK)


def test_sinkhorn_evens_out_what_top_k_does_not() -> None:
    router = make_router(E, E, logits=True, name="sinkhorn")
    x_TD = torch.randn(400, E) + 3 * torch.arange(E)
    balanced, greedy = router(x_TD), router.eval()(x_TD)
    assert greedy.counts_E.max() > 350
    assert balanced.counts_E.max() < 130
    assert balanced.counts_E.min() > 70


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"assignment": "optimal"}], ids=str)
def test_evaluation_is_greedy_and_sees_no_other_token(options: dict) -> None:
    router = make_router(D, E, name="sinkhorn", **options).eval()
    x_TD = torch.randn(20, D)
    routing = router(x_TD)
    expected_TK = (x_TD @ router.weight.T).topk(router.config.top_k).indices
    assert torch.equal(routing.expert_ids_N, expected_TK.view(-1))
    alone = router(x_TD[7:8])
    assert torch.equal(alone.expert_ids_N, expected_TK[7])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"assignment": "optimal"}], ids=str)
def test_weights_and_gradient(options: dict, training: bool) -> None:
    """Sigmoid for one expert, else the softmax over all, not renormalised; the choice is a constant."""
    router = make_router(D, E, name="sinkhorn", **options).train(training)
    top_k = router.config.top_k
    x_TD, upstream_N = torch.randn(20, D, requires_grad=True), torch.randn(20 * top_k)
    routing = router(x_TD)
    routing.weights_N.backward(upstream_N)
    x64_TD, weight_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, router.weight))
    logits_TE = x64_TD @ weight_ED.T
    gates_TE = 1 / (1 + torch.exp(-logits_TE))
    if top_k > 1:
        gates_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(-1, keepdim=True)
    weights_N = gates_TE[routing.token_ids_N, routing.expert_ids_N]
    weights_N.backward(upstream_N.double())
    assert_close("weights", routing.weights_N, weights_N, torch.float32)
    assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)
    assert_close("dweight", router.weight.grad, weight_ED.grad, torch.float32)


@pytest.mark.parametrize("assignment", ["sinkhorn", "optimal"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_extremes(assignment: str, scale: float, num_tokens: int) -> None:
    router = make_router(E, E, logits=True, name="sinkhorn", assignment=assignment)
    x_TD = (scale * torch.randn(num_tokens, E)).requires_grad_()
    routing = router(x_TD)
    check_routing(routing, num_tokens, E)
    if assignment == "optimal":
        assert max(routing.counts_E) - min(routing.counts_E) <= 1
    routing.weights_N.sum().backward()
    assert x_TD.grad.isfinite().all()


def test_padding_alone() -> None:
    for assignment in ("sinkhorn", "optimal"):
        router = make_router(D, E, name="sinkhorn", assignment=assignment, group="sequence")
        routing = router(torch.randn(6, D), info(2, torch.tensor([False] * 3 + [True] * 3)))
        check_routing(routing, 6, E)


def test_layer_trains_without_a_balance_loss() -> None:
    layer = make_layer(D, router={"name": "sinkhorn", "assignment": "optimal"}, balance=BalanceConfig(aux_coef=1.0))
    layer(torch.randn(2, 8, D, requires_grad=True)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert layer.stats.counts_E.tolist() == [4] * E
    assert not [name for name in layer.stats.sums if name.startswith("loss/")]


def test_initialisation() -> None:
    router = make_router(64, E, name="sinkhorn", init="orthogonal")
    gram_EE = (router.weight @ router.weight.T).detach()
    torch.testing.assert_close(gram_EE, 0.01 * torch.eye(E), atol=1e-6, rtol=0)
    router = make_router(400, E, name="sinkhorn")
    router.reset_parameters(0.3)
    assert router.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_the_leak_has_two_ways_out() -> None:
    for group in ("batch", "sequence"):
        problem = make_router(D, E, name="sinkhorn", group=group).causal_problem()
        assert problem is not None
        assert f"'sinkhorn' with router.group={group!r} looks at later tokens" in problem
        assert "set router.group=position, or router.accept_leak=true" in problem
    assert make_router(D, E, name="sinkhorn", group="position").causal_problem() is None
    assert make_router(D, E, name="sinkhorn", accept_leak=True).causal_problem() is None


def test_choice_is_of_the_clean_logits() -> None:
    router = make_router(E, E, logits=True, name="sinkhorn")
    x_TD = torch.randn(9, E)
    routing: Routing = router(x_TD)
    assert torch.equal(routing.logits_TE, x_TD)
    assert torch.equal(routing.probs_TE, x_TD.softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assignment": "auction"}, r"router.assignment='auction' is unknown; use 'sinkhorn' or 'optimal'"),
        ({"init": "zeros"}, r"router.init='zeros' is unknown; use 'normal' or 'orthogonal'"),
        ({"top_k": 0}, r"router.top_k=0 must be at least 1"),
        ({"top_k": 5}, r"router.top_k=5 is more than num_experts=4"),
        ({"max_iterations": 0}, r"router.max_iterations=0 must be at least 1"),
        ({"tolerance": 0.0}, r"router.tolerance=0.0 must be positive"),
        ({"group": "row"}, r"router.group='row' is unknown"),
        (
            {"assignment": "optimal", "top_k": 2},
            r"router.assignment='optimal' gives each token one expert.*top_k=2; set",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(D, E, name="sinkhorn", **options)


def test_differences_that_do_not_count_may_add_up_to_one_that_does() -> None:
    """The search then walked around a cycle of experts for ever; a gain along a cycle is taken first."""
    generator = torch.Generator().manual_seed(272)
    for first, last in ((4, 60), (3, 7)):  # the draws by which this case was found
        torch.randint(first, last, (1,), generator=generator)
    size_T1 = torch.rand(46, 1, generator=generator, dtype=torch.float64) * 4
    detail_TE = torch.rand(46, 6, generator=generator, dtype=torch.float64)
    scores_TE = size_T1 + detail_TE * 10.0 ** -int(torch.randint(8, 11, (1,), generator=generator))
    expert_ids_T = balanced_assignment(scores_TE)
    loads_E = torch.bincount(expert_ids_T, minlength=6)
    assert loads_E.max() - loads_E.min() <= 1
    cost = torch.cat([scores_TE] * 8, 1).numpy()  # eight seats an expert
    rows, columns = linear_sum_assignment(-cost)
    best = cost[rows, columns].sum()
    assert scores_TE.gather(1, expert_ids_T[:, None]).sum().item() == pytest.approx(best, abs=46 * 4 * 1e-9)
