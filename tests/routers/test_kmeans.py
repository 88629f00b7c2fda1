"""MixER's gate: k-means, least squares and matching by hand and on planted clusters; the online form, alone and on ranks.

Legend: C clusters, D model, S samples.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.routers import kmeans
from moe.routers.base import StepLoad
from moe.routers.kmeans import (
    NOISE_STD,
    KMeansRouter,
    first_centroids,
    fit_gate,
    kmeans_l1,
    match_experts,
)
from moe.types import TokenInfo

C, D = 4, 6
NAME: dict[str, Any] = {"name": "kmeans"}
CENTRES_CD = 3 * torch.eye(C, D) + 1


def planted(num_samples: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """(S, D) samples around far centres, and the centre of each."""
    centre_S = torch.arange(num_samples) % C
    return CENTRES_CD[centre_S] + spread * torch.randn(num_samples, D), centre_S


def step(router: KMeansRouter, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    router.after_step(StepLoad(counts_E=torch.zeros(C, dtype=torch.int64), model_density=None, reduce=reduce))


def is_one_to_one(router: KMeansRouter, expert_C: list[int] | None = None) -> bool:
    """Whether fresh samples of each centre go to an expert of their own, or to the given one."""
    x_SD, centre_S = planted(40)
    expert_S = router.eval()(x_SD).expert_ids_N
    router.train()
    found = [set(expert_S[centre_S == centre].tolist()) for centre in range(C)]
    if expert_C is not None:
        return found == [{expert} for expert in expert_C]
    return all(len(experts) == 1 for experts in found) and len(set.union(*found)) == C


# ---- pure functions ----


def test_samples_go_to_the_nearest_in_mean_absolute_distance() -> None:
    """(0, 0) is 3 and 4 away from these centroids by absolute distance, 3 and 2.83 by Euclid's."""
    centroids_CD = torch.tensor([[3.0, 0], [2, 2]])
    found = kmeans_l1(torch.tensor([[0.0, 0], [2, 3]]), centroids_CD, max_iterations=1)
    assert found.cluster_S.tolist() == [0, 1]


def test_centroids_are_weighted_means_and_the_search_stops_when_they_rest() -> None:
    x_SD = torch.tensor([[0.0], [1], [5], [9], [100]])
    weights_S = torch.tensor([1.0, 1, 1, 1, 0])
    start_CD = torch.tensor([[0.0], [4]])
    found = kmeans_l1(x_SD, start_CD, weights_S, max_iterations=1)
    assert found.centroids_CD.tolist() == [[0.5], [7]]
    assert not found.converged
    found = kmeans_l1(x_SD, start_CD, weights_S, max_iterations=2)
    assert found.converged, "the second iteration moves nothing"
    assert found.cluster_S.tolist() == [0, 0, 1, 1, 1]
    assert kmeans_l1(x_SD, start_CD, weights_S, tolerance=3.0, max_iterations=1).converged, "it moves by 3"
    assert not kmeans_l1(x_SD, start_CD, weights_S, tolerance=2.9, max_iterations=1).converged


def test_an_empty_cluster_ends_the_search() -> None:
    found = kmeans_l1(torch.tensor([[0.0], [1]]), torch.tensor([[0.0], [50]]))
    assert found.has_empty
    assert not found.converged


def test_planted_clusters_are_recovered() -> None:
    x_SD, centre_S = planted(400)
    found = kmeans_l1(x_SD, CENTRES_CD + torch.randn(C, D))
    assert found.converged
    assert torch.equal(found.cluster_S, centre_S)
    torch.testing.assert_close(found.centroids_CD, CENTRES_CD, atol=0.05, rtol=0)


def test_first_centroids_are_means_of_a_partition() -> None:
    x_SD, _ = planted(300, spread=1.0)
    centroids_CD = first_centroids(x_SD, torch.ones(300), C, seed=3)
    assert torch.equal(centroids_CD, first_centroids(x_SD, torch.ones(300), C, seed=3))
    assert not torch.equal(centroids_CD, first_centroids(x_SD, torch.ones(300), C, seed=4))
    assert not kmeans_l1(x_SD, centroids_CD).has_empty
    # Moved samples, moved centroids: the partition is around their mean.
    moved_CD = first_centroids(x_SD + 50, torch.ones(300), C, seed=3)
    torch.testing.assert_close(moved_CD - 50, centroids_CD, atol=1e-3, rtol=0)
    assert first_centroids(x_SD, torch.zeros(300), C, seed=3).shape == (C, D)


def test_fit_is_least_squares() -> None:
    x_SD, centre_S = planted(200, spread=1.0)
    gate_EI = fit_gate(x_SD, centre_S, C)
    x_SI = torch.nn.functional.pad(x_SD, (0, 1), value=1.0).double()
    expected_IE = torch.linalg.lstsq(x_SI, torch.nn.functional.one_hot(centre_S).double()).solution
    torch.testing.assert_close(gate_EI.double(), expected_IE.T, atol=1e-6, rtol=1e-5)
    half_S = (torch.arange(200) < 100).float()
    assert torch.equal(fit_gate(x_SD, centre_S, C, half_S), fit_gate(x_SD[:100], centre_S[:100], C))


@pytest.mark.parametrize("std", [NOISE_STD, 0.5])
def test_the_ridge_is_the_expected_effect_of_noise(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inputs that are copies of each other, 50 samples: sums over noisy inputs are larger by 50 std^2 on the diagonal."""
    monkeypatch.setattr(kmeans, "NOISE_STD", std)
    x_SD = torch.randn(50, 1).repeat(1, 2)
    expert_S = (x_SD[:, 0] > 0).long()
    gate_EI = fit_gate(x_SD, expert_S, 2)
    x_SI = torch.nn.functional.pad(x_SD, (0, 1), value=1.0).double()
    gram_II = x_SI.T @ x_SI + 50 * std**2 * torch.diag(torch.tensor([1.0, 1, 0])).double()
    expected_IE = torch.linalg.inv(gram_II) @ (x_SI.T @ torch.nn.functional.one_hot(expert_S).double())
    torch.testing.assert_close(gate_EI, expected_IE.T.float(), atol=1e-4, rtol=1e-4)
    assert gate_EI[0, 0].item() == pytest.approx(gate_EI[0, 1].item(), rel=1e-3), "nothing else decides between copies"


def test_matching_is_greedy_in_the_order_of_the_clusters() -> None:
    assert match_experts(torch.tensor([[1.0, 2, 3], [0, 5, 6], [0, 9, 1]])).tolist() == [0, 1, 2]
    assert match_experts(torch.tensor([[3.0, 1, 2], [3, 1, 2]])).tolist() == [1, 2]
    assert match_experts(torch.zeros(3, 3)).tolist() == [0, 1, 2]


# ---- the gate ----


def test_forward_is_the_largest_of_w_x_1_with_weight_one() -> None:
    router = make_router(D, C, **NAME)
    x_TD = torch.randn(20, D, requires_grad=True)
    routing = router(x_TD)
    scores_TE = torch.cat([x_TD, torch.ones(20, 1)], dim=1) @ router.gate_EI.T
    torch.testing.assert_close(routing.logits_TE, scores_TE)
    assert torch.equal(routing.expert_ids_N, scores_TE.argmax(-1))
    assert routing.weights_N.tolist() == [1.0] * 20
    assert not routing.weights_N.requires_grad and not routing.logits_TE.requires_grad
    assert not list(router.parameters())
    assert router.gate_EI.abs().max() <= D**-0.5
    assert router.gate_EI.std() > 0.4 * D**-0.5, "uniform: 0.58"


def test_buffers_stay_in_fp32() -> None:
    router = make_router(D, C, **NAME).to(torch.bfloat16)
    assert {router.gate_EI.dtype, router.centroids_ED.dtype} == {torch.float32}
    assert router(torch.randn(5, D).bfloat16()).logits_TE.dtype == torch.float32


# ---- updates from losses, as in the paper ----


def test_update_sends_each_cluster_to_the_expert_with_the_lowest_median_loss() -> None:
    x_SD, centre_S = planted(80)
    best_C = torch.tensor([2, 0, 3, 1])
    losses_SE = torch.rand(80, C) + 1
    losses_SE[torch.arange(80), best_C[centre_S]] = 0.5
    losses_SE[:8, :] = torch.nn.functional.one_hot(best_C[centre_S[:8]]) * 1e6  # outliers that turn the means around
    router = make_router(D, C, **NAME)
    router.centroids_ED.copy_(CENTRES_CD + 0.5)
    assert router.update(x_SD, losses_SE)
    assert is_one_to_one(router, best_C.tolist())


def test_update_without_convergence_or_with_an_empty_cluster_changes_no_gate() -> None:
    x_SD, _ = planted(80)
    router = make_router(D, C, **NAME)
    before_EI = router.gate_EI.clone()
    router.centroids_ED.copy_(torch.cat([CENTRES_CD[:3], torch.full((1, D), 1e3)]))
    assert not router.update(x_SD, torch.rand(80, C))
    assert (router.centroids_ED == 0).all(), "an empty cluster: the next update starts afresh"
    line_SD = torch.linspace(0, 1, 4000)[:, None].repeat(1, D)  # many small moves: no rest within 20 iterations
    start_ED = torch.tensor([0.0, 0.01, 0.02, 0.03])[:, None].repeat(1, D)
    router.centroids_ED.copy_(start_ED)
    assert not router.update(line_SD, torch.rand(4000, C))
    assert router.centroids_ED[3, 0] > 0.3, "not converged: the next update goes on from here"
    assert torch.equal(router.gate_EI, before_EI)
    with pytest.raises(
        ValueError, match=r"losses_SE has shape \(80, 3\); give one loss per context and expert, \(80, 4"
    ):
        router.update(x_SD, torch.rand(80, 3))


# ---- the online form ----


def test_a_layers_gate_finds_the_clusters_of_its_tokens() -> None:
    router = make_router(D, C, update_every=5, num_samples=200, **NAME)
    assert not is_one_to_one(router)
    gates = []
    for _ in range(40):
        router(planted(64)[0])
        step(router)
        gates.append(router.gate_EI.clone())
    assert is_one_to_one(router)
    changed = [index for index in range(1, 40) if not torch.equal(gates[index], gates[index - 1])]
    assert changed and all((index + 1) % 5 == 0 for index in changed), "in every fifth step only"
    assert int(router.steps) == 40
    expert_S = router.eval()(CENTRES_CD).expert_ids_N.tolist()
    router.train()
    for _ in range(10):
        router(planted(64)[0])
        step(router)
        assert is_one_to_one(router, expert_S), "warm-started: a cluster keeps its expert"


def test_a_rerun_forward_and_other_micro_batches_count_once() -> None:
    router = make_router(D, C, update_every=2, num_samples=8, **NAME)
    x_TD = torch.arange(8.0)[:, None].repeat(1, D)
    router(x_TD)
    noted_SD = router._samples_SD.clone()
    assert noted_SD[:, 0].tolist() == [0, 2, 4, 6, 0, 0, 0, 0], (
        "tokens at equal distances; the other rows are the next step's"
    )
    assert router._filled_S.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    router(x_TD)
    assert torch.equal(router._samples_SD, noted_SD)
    router(x_TD + 10)
    assert router._samples_SD[:4, 0].tolist() == [10, 12, 14, 16], "the last micro-batch of a step stays"
    router.eval()(x_TD + 50)
    assert router._samples_SD.max() == 16, "evaluation leaves no trace"
    router.train()
    step(router)
    router(x_TD + 20)
    assert router._samples_SD[:, 0].tolist() == [10, 12, 14, 16, 20, 22, 24, 26]
    step(router)
    router(x_TD + 30)
    assert router._samples_SD[:, 0].tolist() == [30, 32, 34, 36, 20, 22, 24, 26], "the oldest step is overwritten"


def test_padding_and_missing_tokens_are_no_samples() -> None:
    router = make_router(D, C, update_every=1, num_samples=6, **NAME)
    x_TD = torch.arange(8.0)[:, None].repeat(1, D)
    router(x_TD, TokenInfo(keep_T=torch.tensor([False, True, False, True, True, False, False, True])))
    kept = router._samples_SD[router._filled_S > 0, 0]
    assert kept.tolist() == [1, 3, 4, 7]
    router(x_TD[:2])
    assert router._samples_SD[router._filled_S > 0, 0].tolist() == [0, 1]
    router(x_TD, TokenInfo(keep_T=torch.zeros(8, dtype=torch.bool)))
    assert router._filled_S.sum() == 0
    router(x_TD[:0])


def test_no_samples_or_bad_samples_change_nothing() -> None:
    router = make_router(D, C, update_every=1, num_samples=50, **NAME)
    router.centroids_ED.copy_(CENTRES_CD)
    before = {name: value.clone() for name, value in router.named_buffers() if name != "steps"}
    step(router)
    assert (router.centroids_ED == 0).all(), "nothing in any cluster: start afresh"
    for bad in (torch.full((50, D), float("nan")), torch.ones(50, D)):  # all in one cluster
        router(bad)
        step(router)
    x_TD, _ = planted(50)
    for bad in (float("nan"), float("inf")):  # a cluster whose mean is lost
        router.centroids_ED.copy_(CENTRES_CD)
        router(torch.cat([x_TD[:49], torch.full((1, D), bad)]))
        step(router)
        assert (router.centroids_ED == 0).all()
        assert torch.equal(router.gate_EI, before["gate_EI"])
    router.centroids_ED.copy_(CENTRES_CD)
    router(x_TD)
    step(router)
    assert is_one_to_one(router), "and it goes on"
    alone = make_router(D, 1, update_every=1, num_samples=50, **NAME)  # its cluster is never empty
    alone(torch.full((50, D), float("nan")))
    step(alone)
    assert alone.centroids_ED.isfinite().all()


def test_reset_forgets_the_samples() -> None:
    router = make_router(D, C, update_every=1, num_samples=50, **NAME)
    router(planted(50)[0])
    router.reset_parameters(0.02)
    before_EI = router.gate_EI.clone()
    router.centroids_ED.copy_(CENTRES_CD)
    step(router)
    assert torch.equal(router.gate_EI, before_EI)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gate(use_reentrant: bool) -> None:
    gates = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        layer = make_layer(D, router={**NAME, "update_every": 2, "num_samples": 64})
        for _ in range(4):
            for _ in range(2):
                x_TD = planted(32)[0].requires_grad_()
                y_TD = checkpoint(layer, x_TD, use_reentrant=use_reentrant) if checkpointed else layer(x_TD)
                y_TD.square().sum().backward()
            layer.finish_step()
        gates.append(layer.router.gate_EI.clone())
    assert torch.equal(gates[0], gates[1])
    assert gates[0].abs().max() > D**-0.5, "it was updated"


# ---- ranks ----


class Ranks:
    """A sum over threads that act as ranks."""

    def __init__(self, world_size: int) -> None:
        self._barrier, self._tensors = threading.Barrier(world_size, timeout=30), [torch.empty(0)] * world_size

    def run(self, work: Callable[[int, Callable[[Tensor], Tensor]], None]) -> None:
        threads = [
            threading.Thread(target=work, args=(rank, lambda tensor, rank=rank: self._sum(tensor, rank)))
            for rank in range(len(self._tensors))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)

    def _sum(self, tensor: Tensor, rank: int) -> Tensor:
        self._tensors[rank] = tensor
        self._barrier.wait()
        total = torch.stack(self._tensors).sum(0)
        self._barrier.wait()
        return total


def test_ranks_find_what_one_rank_finds_on_all_their_tokens() -> None:
    batches = [planted(90, spread=1.0)[0] for _ in range(6)]
    options = {"update_every": 3, **NAME}
    torch.manual_seed(1)
    whole = make_router(D, C, num_samples=270, **options)
    before_EI = whole.gate_EI.clone()
    for x_TD in batches:
        whole(x_TD)
        step(whole)
    assert not torch.equal(whole.gate_EI, before_EI)

    torch.manual_seed(1)
    parts = [make_router(D, C, num_samples=size, **options) for size in (90, 180, 90)]
    for part in parts:
        part.load_state_dict(parts[0].state_dict())
    rows = (slice(0, 30), slice(30, 90), slice(0, 0))  # the third rank has no token

    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        for x_TD in batches:
            parts[rank](x_TD[rows[rank]])
            step(parts[rank], reduce)

    Ranks(3).run(work)
    for part in parts:
        assert torch.equal(part.gate_EI, parts[0].gate_EI), "the same on all ranks"
        torch.testing.assert_close(part.gate_EI, whole.gate_EI, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.centroids_ED, whole.centroids_ED, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "router.update_every=0 must be at least 1"),
        ({"num_samples": 0}, "router.num_samples=0 must be at least 1"),
        ({"num_samples": 3}, "router.num_samples=3 is below num_experts=4"),
        ({"tolerance": -0.1}, "router.tolerance=-0.1 must not be negative"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(D, C, **NAME, **options)
