"""Hash routing: the three maps from ids to experts, by hand, by statistics, and in a model that has only new ids in a step."""

from itertools import permutations

import pytest
import torch
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from models.tiny import VOCAB, layers_of, make_model, tokens
from torch import Tensor

from moe.routers.hash import HashRouter, distinct_experts, mix, pack_balanced
from moe.types import Routing, TokenInfo

E = 8


def route(router: HashRouter, ids: list[int] | Tensor) -> Routing:
    ids_T = torch.as_tensor(ids)
    return router(torch.randn(len(ids_T), 4), TokenInfo(input_ids_T=ids_T))


def chosen(router: HashRouter, ids: list[int] | Tensor) -> list[list[int]]:
    return route(router, ids).expert_ids_N.view(len(ids), -1).tolist()


@pytest.mark.parametrize("method", ["mod", "random", "balanced"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_only_the_id_decides(method: str, top_k: int) -> None:
    router = make_router(4, E, name="hash", method=method, top_k=top_k, vocab_size=50)
    if method == "balanced":
        router.set_token_counts(torch.arange(50))
    ids_T = torch.randint(50, (30,))
    first, again = route(router, ids_T), route(router.eval(), ids_T)
    assert torch.equal(first.expert_ids_N, again.expert_ids_N)
    by_id = dict(zip(ids_T.tolist(), first.expert_ids_N.view(-1, top_k).tolist(), strict=True))
    assert chosen(router, ids_T.flip(0)) == [by_id[i] for i in ids_T.flip(0).tolist()]
    assert all(len(set(experts)) == top_k for experts in by_id.values())
    assert first.weights_N.tolist() == pytest.approx([1 / top_k] * 30 * top_k)
    assert not list(router.parameters()) and not first.aux_losses and first.probs_TE is None


def test_mod() -> None:
    assert chosen(make_router(4, E, name="hash", method="mod"), [0, 7, 8, 21]) == [[0], [7], [0], [5]]
    # 8 = 1 * 8 + 0: the second expert of the ids 0, 8, 16, ... is one further on each
    assert chosen(make_router(4, E, name="hash", method="mod", top_k=2), [0, 8, 16, 48, 56]) == [
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 7],
        [0, 1],
    ]
    every = chosen(make_router(4, E, name="hash", method="mod", top_k=3), torch.arange(8 * 7 * 6))
    assert sorted(map(tuple, every)) == sorted(permutations(range(E), 3)), "each ordered choice once"


def test_mod_of_small_ids_loads_all_experts_alike() -> None:
    """Ids too small for a second digit still fill every expert as second choice."""
    routing = route(make_router(4, E, name="hash", method="mod", top_k=4), torch.arange(2 * E))
    assert routing.counts_E.tolist() == [2 * 4] * E


def test_distinct_experts_by_enumeration() -> None:
    """Every combination of codes once: every ordered choice of 3 of 5 experts equally often."""
    codes_TK = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(3))
    experts_TK = distinct_experts(codes_TK, 5)
    assert sorted(map(tuple, experts_TK.tolist())) == sorted(permutations(range(5), 3))
    assert torch.equal(distinct_experts(codes_TK + torch.tensor([5, 4, 3]), 5), experts_TK)
    assert distinct_experts(torch.tensor([[2, 0, 0, 0]]), 4).tolist() == [[2, 3, 0, 1]]
    assert distinct_experts(torch.zeros(0, 3, dtype=torch.int64), 5).shape == (0, 3)


def splitmix64(start: int, index: int) -> int:
    """Output number ``index`` of the generator, in Python's integers."""
    z = (start + index) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    # The first output of the reference generator with seed 0.
    assert splitmix64(0x9E3779B97F4A7C15, 0) == 0xE220A8397B1DCDAF
    ids_T = torch.tensor([0, 1, 2, 31999, 151935, 2**40])
    for seed in (0, 1, 12345):
        start = (seed + 1) * 0x9E3779B97F4A7C15
        assert mix(ids_T, seed).tolist() == [splitmix64(start, i) % 2**63 for i in ids_T.tolist()]


def test_random_is_uniform_and_its_seeds_differ() -> None:
    """Chi-squared over experts and over ordered pairs; the limits are the 99.99 % quantiles for 7 and 55 degrees of freedom."""
    ids_T = torch.arange(20000)
    routing = route(make_router(4, E, name="hash", top_k=2), ids_T)
    experts_TK = routing.expert_ids_N.view(-1, 2)
    pairs = torch.bincount(experts_TK[:, 0] * E + experts_TK[:, 1], minlength=E * E).double()
    pairs = pairs[pairs > 0]
    assert len(pairs) == 56
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < 104
    firsts = torch.bincount(experts_TK[:, 0]).double()
    assert ((firsts - firsts.mean()) ** 2 / firsts.mean()).sum() < 29.9
    other = route(make_router(4, E, name="hash", top_k=2, seed=1), ids_T).expert_ids_N.view(-1, 2)
    same = (other[:, 0] == experts_TK[:, 0]).double().mean()
    assert abs(same - 1 / E) < 4 * (7 / 64 / 20000) ** 0.5, "4 standard deviations"


def test_balanced_packing_by_hand() -> None:
    # 9 -> expert 0, 5 -> 1, 4 -> 2, 3 -> 2 (4 < 5), 2 -> 1 (5 < 7), 1 -> 1 (7, tie with 2: the lower one)
    assert pack_balanced(torch.tensor([3, 9, 1, 4, 2, 5]), 3, 1)[:, 0].tolist() == [2, 0, 1, 2, 1, 1]
    # two experts each: 9 -> 0, 1; 5 -> 2, 3; 4 -> 2, 3 (5 each, below 9)
    assert pack_balanced(torch.tensor([5, 9, 4]), 4, 2).tolist() == [[2, 3], [0, 1], [2, 3]]


def test_ids_that_never_occur_are_dealt_out() -> None:
    table_VK = pack_balanced(torch.tensor([0, 100, 0, 0, 0]), 3, 1)
    assert table_VK[:, 0].tolist() == [0, 0, 1, 2, 0]
    assert pack_balanced(torch.zeros(4, dtype=torch.int64), 3, 2).tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_balanced_balances_natural_frequencies() -> None:
    """Zipf's law over 2000 ids: mod and random overload an expert, the table does not."""
    counts_V = (1e6 / torch.arange(1, 2001)).long()
    ids_V = torch.arange(2000)
    worst = {}
    for method in ("mod", "random", "balanced"):
        router = make_router(4, E, name="hash", method=method, vocab_size=2000)
        if method == "balanced":
            router.set_token_counts(counts_V)
        experts_V = route(router, ids_V).expert_ids_N
        load_E = torch.zeros(E, dtype=torch.int64).index_add(0, experts_V, counts_V).double()
        worst[method] = (load_E.max() / load_E.mean()).item()
    assert worst["balanced"] < 1.01 < 1.2 < min(worst["mod"], worst["random"]), worst


def test_a_table_is_needed_and_made_once() -> None:
    router = make_router(4, E, name="hash", method="balanced", vocab_size=5)
    assert router.needs_token_counts
    with pytest.raises(ValueError, match=r"router.method=balanced has no table yet; call router.set_token_counts"):
        route(router, [1])
    router.set_token_counts(torch.tensor([1, 2, 3, 4, 5]))
    assert not router.needs_token_counts
    route(router, [1])
    other = make_router(4, E, name="hash", method="balanced", vocab_size=5)
    other.load_state_dict(router.state_dict())
    assert not other.needs_token_counts, "a loaded table is a table"
    assert chosen(other, [0, 1, 2, 3, 4]) == chosen(router, [0, 1, 2, 3, 4])
    router.reset_parameters(0.02)
    assert router.needs_token_counts, "seen again after every change"
    assert not make_router(4, E, name="hash", method="mod").needs_token_counts


@pytest.mark.parametrize(
    ("options", "counts", "message"),
    [
        ({"method": "mod"}, 5, "router.method='mod' has no table; set router.method=balanced"),
        ({"method": "balanced"}, 5, r"router.vocab_size=None and token counts of shape \(5,\) do not fit; set"),
        ({"method": "balanced", "vocab_size": 6}, 5, r"router.vocab_size=6 and token counts of shape \(5,\)"),
    ],
)
def test_counts_that_do_not_fit(options: dict, counts: int, message: str) -> None:
    router = make_router(4, E, name="hash", **options)
    with pytest.raises(ValueError, match=message):
        router.set_token_counts(torch.ones(counts, dtype=torch.int64))


def test_ids_are_needed() -> None:
    router = make_router(4, E, name="hash")
    with pytest.raises(
        ValueError, match=r"needs the vocabulary ids of its 3 tokens and got none; .*input_ids, not inp"
    ):
        router(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"ids of its 3 tokens and got \(2,\)"):
        router(torch.randn(3, 4), TokenInfo(input_ids_T=torch.tensor([1, 2])))
    layer = make_layer(router={"name": "hash", "method": "mod"})
    layer.context.input_ids_T = torch.tensor([1, 5, 2])
    x_TD = torch.randn(3, 6, requires_grad=True)
    layer(x_TD).sum().backward()
    assert layer.stats.counts_E.tolist() == [0, 2, 1, 0]
    assert x_TD.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "md5"}, "router.method='md5' is unknown; use one of mod, random, balanced"),
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"top_k": 9}, "router.top_k=9 is more than num_experts=8"),
        ({"vocab_size": 0}, "router.vocab_size=0 must be at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(4, E, name="hash", **options)


@pytest.mark.parametrize("method", ["mod", "random", "balanced"])
def test_generation_with_a_cache_is_generation_without(method: str) -> None:
    """With a cache, a step brings the ids of the new tokens only."""
    model = make_model(router={"name": "hash", "method": method, "top_k": 2, "vocab_size": VOCAB}).eval()
    for layer in layers_of(model):
        if method == "balanced":
            layer.router.set_token_counts(torch.arange(VOCAB))
    prompt = tokens(3, 6)
    cached = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))
    assert len(cached[:, 6:].unique()) > 2, "it says something"
    with pytest.raises(ValueError, match="input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(prompt))
