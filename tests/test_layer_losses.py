"""Auxiliary losses of a layer: their gradients, scale, scopes, masks, and statistics counted once."""

from collections.abc import Callable

import pytest
import torch
from helpers import oracles
from helpers.layer_oracle import assert_same_gradients, gradients, make_layer, same_weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.layer import MoELayer
from moe.observe import RoutingContext, record_loss_scale
from moe.routers.balance import BalanceConfig
from moe.types import Routing

B, L, D, E = 3, 7, 6, 4

Call = Callable[[MoELayer, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "plain": lambda layer, x: layer(x),
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "non_reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "block_reentrant": lambda layer, x: checkpoint(lambda h: layer(h.tanh()).sin(), x, use_reentrant=True),
    "block_non_reentrant": lambda layer, x: checkpoint(lambda h: layer(h.tanh()).sin(), x, use_reentrant=False),
}
BALANCES = {
    "micro_batch": BalanceConfig(aux_coef=0.5, aux_scope="micro_batch"),
    "sequence": BalanceConfig(aux_coef=0.5, aux_scope="sequence"),
    "global_batch": BalanceConfig(aux_coef=0.5, aux_scope="global_batch"),
    "z": BalanceConfig(aux_coef=0.0, z_coef=0.3),
    "both": BalanceConfig(aux_coef=0.5, z_coef=0.3),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    return CALLS[request.param]


def data() -> Tensor:
    return torch.randn(B, L, D, requires_grad=True)


def explicit_loss(balance: BalanceConfig, routing: Routing, counts: list[int] | None = None) -> Tensor:
    """The losses of the papers, from a routing, to be added to the training loss by hand."""
    assert routing.probs_TE is not None
    assert routing.logits_TE is not None
    ids, tokens = routing.expert_ids_N.tolist(), routing.token_ids_N.tolist()
    if balance.aux_scope == "sequence":
        value = oracles.sequence_loss(routing.probs_TE, ids, tokens, B, [True] * routing.num_tokens)
    else:
        value = oracles.switch_loss(routing.probs_TE, counts or [ids.count(e) for e in range(E)])
    z_loss = routing.logits_TE.exp().sum(-1).log().square().mean()
    return balance.aux_coef * value + balance.z_coef * z_loss


def explicit_gradients(layer: MoELayer, call: Call, x: Tensor, main: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients where the loss is added by hand to what a layer without losses computes."""
    bare = same_weights(layer, router=layer.spec.router)
    own_x = x.detach().clone().requires_grad_()
    loss = main(call(bare, own_x))
    fed_x = own_x.tanh() if call in (CALLS["block_reentrant"], CALLS["block_non_reentrant"]) else own_x
    (loss + explicit_loss(layer.spec.balance, bare.router(fed_x.view(-1, D)))).backward()
    return gradients(bare, own_x)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.mark.parametrize("name", BALANCES)
def test_attached_losses_are_losses_added_by_hand(name: str, call: Call) -> None:
    layer, x = make_layer(D, balance=BALANCES[name]), data()
    mean_square(call(layer, x)).backward()
    expected = explicit_gradients(layer, call, x, mean_square)
    assert_same_gradients(gradients(layer, x), expected)

    bare = same_weights(layer)
    bare_x = x.detach().clone().requires_grad_()
    mean_square(call(bare, bare_x)).backward()
    assert (bare.router.weight.grad - expected["router.weight"]).abs().max() > 1e-3, "the loss is too small to show"


def test_the_value_is_untouched() -> None:
    layer, x = make_layer(D, balance=BALANCES["both"]), data()
    assert torch.equal(layer(x), same_weights(layer)(x))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_the_loss_scale_applies_once(scale: float, call: Call) -> None:
    """As with a gradient scaler, or a loss divided by the number of micro-batches."""
    context = RoutingContext()
    layer, x = make_layer(D, balance=BALANCES["both"], context=context), data()
    loss = record_loss_scale(mean_square(call(layer, x)), context)
    (loss * scale).backward()
    unscaled = explicit_gradients(layer, call, x, mean_square)
    assert_same_gradients(gradients(layer, x), {name: value * scale for name, value in unscaled.items()})


def test_a_share_of_the_step_weighs_the_losses_but_not_the_main_loss(call: Call) -> None:
    context = RoutingContext()
    layer, x = make_layer(D, balance=BALANCES["both"], context=context), data()
    record_loss_scale(call(layer, x).square().sum() / 1000, context, share=0.25).backward()
    expected = explicit_gradients(layer, call, x, lambda y: 4 * y.square().sum() / 1000)
    assert_same_gradients(gradients(layer, x), {name: value / 4 for name, value in expected.items()})


def test_the_recorded_loss_may_be_scaled_in_place() -> None:
    """As HF `Trainer` does with the model's loss."""
    context = RoutingContext()
    total = (torch.ones(3, requires_grad=True) * 2).sum()
    loss = record_loss_scale(total, context)
    loss *= 8
    loss.backward()
    assert context.loss_scale == 8
    assert total.item() == 6


def test_statistics_are_counted_once(call: Call) -> None:
    layer, x = make_layer(D, balance=BALANCES["both"], capacity_factor=0.5), data()
    y = call(layer, x)
    assert layer.stats.num_micro_batches == 0, "counted before backward"
    y.sum().backward()
    fed_x = x.tanh() if call in (CALLS["block_reentrant"], CALLS["block_non_reentrant"]) else x
    routing = layer.router(fed_x.view(-1, D))
    stats = layer.stats
    assert stats.num_micro_batches == 1
    assert torch.equal(stats.counts_E, routing.counts_E)
    assert stats.sums["assigned"] == B * L * 2
    assert 0 < stats.sums["dropped"] < B * L * 2
    probs_TE = routing.probs_TE
    assert stats.sums["entropy"].item() == pytest.approx(-(probs_TE * probs_TE.log()).sum(-1).mean().item(), rel=1e-4)
    assert stats.sums["logit_norm"].item() == pytest.approx(routing.logits_TE.norm(dim=-1).mean().item(), rel=1e-4)
    switch = oracles.switch_loss(probs_TE, routing.counts_E.tolist()).item()
    z = routing.logits_TE.exp().sum(-1).log().square().mean().item()
    assert stats.sums["loss/switch"].item() == pytest.approx(switch, rel=1e-4)
    assert stats.sums["loss/z"].item() == pytest.approx(z, rel=1e-4)
    assert stats.sums["aux_loss"].item() == pytest.approx(0.5 * switch + 0.3 * z, rel=1e-4)
    assert all(not value.requires_grad for value in stats.sums.values())


def test_statistics_add_up_over_micro_batches(call: Call) -> None:
    layer, parts = make_layer(D), [data(), data(), data()]
    for x in parts:
        call(layer, x).sum().backward()
    stats = layer.finish_step()
    assert stats.num_micro_batches == 3
    assert stats.counts_E.sum() == 3 * B * L * 2
    assert stats.sums["assigned"] == 3 * B * L * 2
    assert layer.stats.num_micro_batches == 0
    assert layer.stats.counts_E is None


def test_accumulation_balances_over_the_whole_step(call: Call) -> None:
    """global_batch: the loads of a micro-batch's loss are those of all micro-batches of the step so far."""
    balance = BALANCES["global_batch"]
    layer = make_layer(D, balance=balance, std=1.0)
    bare = same_weights(layer)
    transform = Tensor.tanh if call in (CALLS["block_reentrant"], CALLS["block_non_reentrant"]) else Tensor.clone
    for _ in range(2):  # two optimizer steps; the second starts from zero
        seen_E = torch.zeros(E, dtype=torch.int64)
        for part in range(3):
            x = (torch.randn(B, L, D) + part).requires_grad_()
            layer.zero_grad()
            bare.zero_grad()
            call(layer, x).sum().backward()
            bare_x = x.detach().clone().requires_grad_()
            loss = call(bare, bare_x).sum()
            routing = bare.router(transform(bare_x).view(-1, D))
            seen_E = seen_E + routing.counts_E
            (loss + explicit_loss(balance, routing, seen_E.tolist())).backward()
            assert_same_gradients(gradients(layer, x), gradients(bare, bare_x))
        layer.finish_step()


def test_global_scope_uses_the_counts_of_all_ranks() -> None:
    """The mean of two ranks' gradients is that of one process with all tokens."""
    layer = make_layer(D, balance=BALANCES["global_batch"])
    x = torch.randn(2 * B, L, D)
    total_E = layer.router(x.view(-1, D)).counts_E
    layer(x).sum().backward()
    whole = {name: p.grad.clone() for name, p in layer.named_parameters()}
    ranks = []
    for part in x.chunk(2):
        rank = same_weights(layer, balance=layer.spec.balance)
        rank.reduce_counts = lambda counts_E: total_E
        (2 * rank(part).sum()).backward()
        ranks.append({name: p.grad.clone() for name, p in rank.named_parameters()})
        assert torch.equal(rank.stats.counts_E, rank.router(part.view(-1, D)).counts_E), "statistics stay local"
    assert_same_gradients({name: (ranks[0][name] + ranks[1][name]) / 2 for name in whole}, whole)


def test_a_router_without_balance_loss_asks_nobody() -> None:
    layer = make_layer(D, router={"name": "round_robin"}, balance=BALANCES["global_batch"])
    layer.reduce_counts = lambda counts_E: pytest.fail("communicated")
    layer(torch.randn(9, D, requires_grad=True)).sum().backward()
    assert layer.stats.num_micro_batches == 1


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_local_scopes_do_not_ask_other_ranks(scope: str) -> None:
    layer = make_layer(D, balance=BALANCES[scope])
    layer.reduce_counts = lambda counts_E: pytest.fail("communicated")
    layer(data()).sum().backward()


def test_evaluation_and_no_grad_attach_nothing() -> None:
    layer = make_layer(D, balance=BALANCES["both"]).eval()
    bare, x = same_weights(layer), data()
    bare_x = x.detach().clone().requires_grad_()
    layer(x).sum().backward()
    bare(bare_x).sum().backward()
    assert_same_gradients(gradients(layer, x), gradients(bare, bare_x))
    with torch.no_grad():
        assert layer.train()(x).grad_fn is None
    with torch.inference_mode():
        layer(x)
    assert layer.stats.num_micro_batches == 0
    assert layer.stats.counts_E is None


@pytest.mark.parametrize("name", ["micro_batch", "global_batch", "z"])
def test_padding_counts_in_no_loss_and_no_statistic(name: str, call: Call) -> None:
    context = RoutingContext()
    layer, x = make_layer(D, balance=BALANCES[name], context=context), data()
    keep = torch.arange(L) < torch.tensor([7, 4, 1])[:, None]
    context.token_mask_T = keep.view(-1)
    (call(layer, x) * keep[..., None]).sum().backward()

    short = same_weights(layer, balance=layer.spec.balance)
    short_x = x.detach()[keep].requires_grad_()
    call(short, short_x).sum().backward()
    assert short_x.grad is not None
    got, expected = gradients(layer, x), gradients(short, short_x)
    assert (got["x"][~keep] == 0).all()
    assert_same_gradients(got | {"x": got["x"][keep]}, expected)
    assert torch.equal(layer.stats.counts_E, short.stats.counts_E)
    for key in ("entropy", "logit_norm", "assigned", "aux_loss"):
        assert layer.stats.sums[key].item() == pytest.approx(short.stats.sums[key].item(), rel=1e-5), key


def test_padding_counts_in_no_loss_of_the_noisy_router() -> None:
    context = RoutingContext()
    layer = make_layer(D, router={"name": "noisy_topk"}, context=context)
    x = data()
    context.token_mask_T = torch.zeros(B * L, dtype=torch.bool)
    (layer(x) * 0).sum().backward()
    assert layer.router.noise_weight.grad.abs().max() == 0


def test_sequence_scope_with_padding() -> None:
    context = RoutingContext()
    layer, x = make_layer(D, balance=BALANCES["sequence"], context=context), data()
    keep_T = torch.rand(B * L) < 0.6
    context.token_mask_T = keep_T
    layer(x).sum().backward()
    bare, bare_x = same_weights(layer), x.detach().clone().requires_grad_()
    routing = bare.router(bare_x.view(-1, D))
    ids, tokens = routing.expert_ids_N.tolist(), routing.token_ids_N.tolist()
    value = oracles.sequence_loss(routing.probs_TE, ids, tokens, B, keep_T.tolist())
    (bare(bare_x).sum() + 0.5 * value).backward()
    assert_same_gradients(gradients(layer, x), gradients(bare, bare_x))


def test_losses_of_the_router_itself_are_attached(call: Call) -> None:
    router = {"name": "noisy_topk", "importance_coef": 2.0, "load_coef": 3.0}
    layer, x = make_layer(D, router=router), data()
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.normal_()
    torch.manual_seed(1)
    call(layer, x).sum().backward()

    bare = same_weights(layer, router=router | {"importance_coef": 0.0, "load_coef": 0.0})
    bare_x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    loss = call(bare, bare_x).sum()
    torch.manual_seed(1)
    fed_x = bare_x.tanh() if call in (CALLS["block_reentrant"], CALLS["block_non_reentrant"]) else bare_x
    aux = bare.router(fed_x.view(-1, D)).aux_losses
    (loss + 2 * aux["importance"].value + 3 * aux["load"].value).backward()
    assert_same_gradients(gradients(layer, x), gradients(bare, bare_x))
    assert layer.stats.sums["loss/load"].item() == pytest.approx(aux["load"].value.item(), rel=1e-5)


def test_two_layers_share_a_context(call: Call) -> None:
    context = RoutingContext()
    first, second = (make_layer(D, balance=BALANCES["both"], context=context) for _ in range(2))
    x = data()
    (3 * record_loss_scale(mean_square(call(second, call(first, x))), context)).backward()
    bare = [same_weights(layer) for layer in (first, second)]
    own_x = x.detach().clone().requires_grad_()
    transform = Tensor.tanh if call in (CALLS["block_reentrant"], CALLS["block_non_reentrant"]) else Tensor.clone
    hidden = call(bare[0], own_x)
    loss = mean_square(call(bare[1], hidden))
    for layer, fed in zip(bare, (own_x, hidden), strict=True):
        loss = loss + explicit_loss(BALANCES["both"], layer.router(transform(fed).view(-1, D)))
    (3 * loss).backward()
    assert_same_gradients(gradients(first, x), gradients(bare[0], own_x))
    assert_same_gradients(gradients(second, x), gradients(bare[1], own_x))


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 5, D)], ids=str)
@pytest.mark.parametrize("name", BALANCES)
@pytest.mark.parametrize("router", ["topk", "noisy_topk", "noaux_tc"])
def test_a_rank_without_tokens(router: str, name: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(D, router={"name": router}, balance=BALANCES[name], capacity_factor=1.0)
    x = torch.zeros(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()
    assert layer.stats.num_micro_batches == 1
    assert layer.stats.counts_E.tolist() == [0] * E
    assert all(value.isfinite() for value in layer.stats.sums.values())


def test_a_frozen_router_still_gives_statistics_and_frozen_layers_still_run() -> None:
    layer, x = make_layer(D, balance=BALANCES["both"]), data()
    layer.router.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.stats.num_micro_batches == 1
    assert layer.router.weight.grad is None
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
