"""Expert choice: who is taken, with what weight and gradient, and how many."""

import math
import warnings

import pytest
import torch
from helpers.close import assert_close
from helpers.layer_oracle import make_layer
from helpers.routing import check_routing, make_router
from helpers.soft import group_lists
from torch import Tensor

from moe.observe import RoutingContext
from moe.routers.expert_choice import choose_tokens, num_taken
from moe.types import Routing, TokenInfo

D, E = 5, 8
pytestmark = pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups here are small


def info(num_sequences: int, keep_T: Tensor | None = None) -> TokenInfo:
    return TokenInfo(num_sequences=num_sequences, keep_T=keep_T)


def pairs(routing: Routing) -> set[tuple[int, int]]:
    """Token and expert of every assignment."""
    return set(zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), strict=True))


def expected_pairs(scores_TE: Tensor, groups: list[list[int]], keep: list[bool], capacity: float) -> set:
    """Every expert's best real tokens of every group."""
    found = set()
    for group in groups:
        real = [t for t in group if keep[t]]
        if not real:
            continue
        taken = max(1, math.floor(len(real) * capacity / E + 0.5))
        for e in range(E):
            best = sorted(real, key=lambda t: -scores_TE[t, e].item())[:taken]
            found |= {(t, e) for t in best}
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity", [0.7, 2.0, 8.0])
@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
def test_choice_weights_and_gradient_against_the_loop(group: str, capacity: float, padded: bool) -> None:
    """7 sequences of 6 tokens; position groups of 4 and 3 where that is enough for the capacity, else of 7."""
    group_size = 4 if capacity >= 2 else 12
    router = make_router(D, E, name="expert_choice", group=group, group_size=group_size, capacity=capacity)
    router.reset_parameters(1.0)
    keep_T = torch.rand(42) < 0.6 if padded else None
    keep = [True] * 42 if keep_T is None else keep_T.tolist()
    x_TD = torch.randn(42, D, requires_grad=True)
    routing = router(x_TD, info(7, keep_T))
    check_routing(routing, 42, E)
    upstream_TE = torch.randn(42, E)
    (routing.weights_N * upstream_TE[routing.token_ids_N, routing.expert_ids_N]).sum().backward()

    x64_TD, weight_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, router.weight))
    scores_TE = torch.exp(x64_TD @ weight_ED.T)
    scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    chosen = expected_pairs(scores_TE, group_lists(7, 6, group, group_size), keep, capacity)
    assert pairs(routing) == chosen
    sum(scores_TE[t, e] * upstream_TE[t, e].double() for t, e in chosen).backward()
    for t, e, weight in zip(routing.token_ids_N, routing.expert_ids_N, routing.weights_N, strict=True):
        assert weight.item() == pytest.approx(scores_TE[t, e].item(), rel=1e-5)
    assert_close("dx", x_TD.grad, x64_TD.grad, torch.float32)
    assert_close("dweight", router.weight.grad, weight_ED.grad, torch.float32)


@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_loads_are_exactly_equal(group: str, scale: float) -> None:
    """Also where all scores are the same, or so far apart that most of them are 0."""
    router = make_router(E, E, logits=True, name="expert_choice", group=group, group_size=8, capacity=2.0)
    routing = router(scale * torch.randn(16 * 4, E), info(16))
    assert routing.counts_E.tolist() == [16] * E  # T * capacity / E
    assert routing.expert_ids_N.numel() / 64 == router.mean_experts_per_token
    check_routing(routing, 64, E)


def test_a_token_may_have_no_expert_or_all() -> None:
    x_TD = 9 * torch.eye(E)
    x_TD[0] = 0.0  # scores 1/8 everywhere, where the others score near 1 for one expert each and near 0 for the rest
    for capacity, experts in ((1.0, {0}), (2.0, set(range(E)))):
        router = make_router(E, E, logits=True, name="expert_choice", group="batch", capacity=capacity)
        assert {e for t, e in pairs(router(x_TD)) if t == 0} == experts
    x_TD[1:] = 9 * torch.eye(E)[[0, *range(2, E)]]  # now some token is better for expert 0, and none for expert 1
    router = make_router(E, E, logits=True, name="expert_choice", group="batch", capacity=1.0)
    assert {e for t, e in pairs(router(x_TD)) if t == 0} == {1}
    x_TD = torch.cat([x_TD, 9 * torch.eye(E)[1:2]])
    assert 0 not in {t for t, _ in pairs(router(x_TD))}


def test_scores_are_a_softmax_over_experts_not_tokens() -> None:
    """A token with large logits everywhere has no advantage."""
    router = make_router(E, E, logits=True, name="expert_choice", group="batch")
    x_TD = torch.randn(20, E)
    shifted_TD = x_TD + torch.linspace(-5, 5, 20)[:, None]
    assert pairs(router(x_TD)) == pairs(router(shifted_TD))


@pytest.mark.parametrize(
    ("rows", "capacity", "taken"),
    [(32, 2.0, 8), (30, 2.0, 8), (29, 2.0, 7), (5, 1.0, 1), (1, 2.0, 1), (3, 8.0, 3), (0, 2.0, 0)],
)
def test_number_taken(rows: int, capacity: float, taken: int) -> None:
    """To the nearest (30 * 2 / 8 = 7.5 gives 8), at least 1, at most all."""
    assert num_taken(rows, capacity, E) == taken
    chosen_GME = choose_tokens(torch.rand(2, rows, E), None, capacity)
    assert (chosen_GME.sum(1) == taken).all()
    padded_GME = choose_tokens(torch.rand(1, rows + 4, E), (torch.arange(rows + 4) < rows)[None], capacity)
    assert (padded_GME.sum(1) == taken).all()


@pytest.mark.parametrize("group", ["sequence", "position"])
def test_padding_changes_nothing_for_the_others(group: str) -> None:
    """Rows that are shorter, or fewer, are routed as they are without what fills them up."""
    router = make_router(D, E, name="expert_choice", group=group, group_size=9)
    x = torch.randn(6, 7, D)
    keep = torch.ones(6, 7, dtype=torch.bool)
    if group == "sequence":
        keep[:, :3] = False
        kept = x[:, 3:]
    else:
        keep[4:] = False
        kept = x[:4]
    padded = router(x.view(-1, D), info(6, keep.view(-1)))
    alone = router(kept.reshape(-1, D), info(len(kept)))
    token_ids = torch.arange(42).view(6, 7)[keep].tolist()
    assert pairs(padded) == {(token_ids[t], e) for t, e in pairs(alone)}


def test_padding_never_takes_room_and_gets_nothing() -> None:
    router = make_router(E, E, logits=True, name="expert_choice", group="batch", capacity=8.0)
    keep_T = torch.tensor([True, False] * 5)
    routing = router(torch.randn(10, E), info(1, keep_T))
    assert set(routing.token_ids_N.tolist()) == {0, 2, 4, 6, 8}
    nothing = router(torch.randn(10, E), info(2, torch.zeros(10, dtype=torch.bool)))
    assert nothing.expert_ids_N.numel() == 0
    context = RoutingContext()
    context.token_mask_T = torch.zeros(10, dtype=torch.bool)
    layer = make_layer(D, num_experts=E, context=context, router={"name": "expert_choice", "group": "batch"})
    x_TD = torch.randn(10, D, requires_grad=True)
    y_TD = layer(x_TD)
    assert not y_TD.any()
    y_TD.sum().backward()


def test_position_groups_do_not_see_other_positions() -> None:
    router = make_router(D, E, name="expert_choice", group="position", group_size=8)
    x = torch.randn(8, 6, D)
    before = pairs(router(x.view(-1, D), info(8)))
    x[2, 5] = 10 * torch.randn(D)
    after = pairs(router(x.view(-1, D), info(8)))
    assert {t % 6 for t, _ in before ^ after} == {5}
    assert {t // 6 for t, _ in before ^ after} - {2}, "tokens of other sequences at that position changed too"


def test_layer_trains() -> None:
    layer = make_layer(D, num_experts=E, router={"name": "expert_choice", "group_size": 8})
    x = torch.randn(8, 3, D, requires_grad=True)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert layer.stats.counts_E.tolist() == [6] * E
    assert not [name for name in layer.stats.sums if name.startswith("loss/")]


def test_only_position_groups_are_causal() -> None:
    for group in ("batch", "sequence"):
        problem = make_router(D, E, name="expert_choice", group=group).causal_problem()
        assert problem is not None
        assert f"'expert_choice' with router.group={group!r} looks at later tokens" in problem
        assert "set router.group=position" in problem
    assert make_router(D, E, name="expert_choice").causal_problem() is None


def test_small_batches_are_told_of() -> None:
    router = make_router(D, E, name="expert_choice")
    with pytest.warns(
        UserWarning, match=r"evaluates 4 experts per token .* ask for 2, .* have 2 tokens only; use a larg"
    ):
        router(torch.randn(6, D), info(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(torch.randn(8, D), info(8))
        router.eval()(torch.randn(6, D), info(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0.0}, r"router.capacity=0.0 must be positive"),
        ({"capacity": 9.0}, r"router.capacity=9.0 is more than num_experts=8; lower it or add experts"),
        ({"group": "row"}, r"router.group='row' is unknown"),
        (
            {"group_size": 3},
            r"router.group_size=3 is below num_experts / router.capacity = 4.*raise router.group_size or",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(D, E, name="expert_choice", **options)
