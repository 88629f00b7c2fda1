"""Noisy top-k gating (arXiv 1701.06538): noise, load probabilities, both losses."""

import pytest
import torch
from helpers.routing import make_router
from torch.nn import functional as F

from moe.routers.noisy_topk import _load_probabilities

E = 6


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_probability_is_the_chance_to_be_chosen(top_k: int) -> None:
    """Monte Carlo of its definition: draw one expert's noise again, leave that of the others."""
    num_draws = 40_000
    logits_TE, std_TE = torch.randn(3, E), torch.rand(3, E) + 0.5
    noisy_TE = logits_TE + torch.randn(3, E) * std_TE
    got_TE = _load_probabilities(logits_TE, noisy_TE, std_TE, top_k)
    for e in range(E):
        others = [i for i in range(E) if i != e]
        threshold_T1 = noisy_TE[:, others].sort(-1, descending=True).values[:, top_k - 1 : top_k]
        drawn_TM = logits_TE[:, e : e + 1] + torch.randn(3, num_draws) * std_TE[:, e : e + 1]
        frequency_T = (drawn_TM > threshold_T1).float().mean(-1)
        torch.testing.assert_close(got_TE[:, e], frequency_T, atol=4 * 0.5 / num_draws**0.5, rtol=0)


def test_starts_at_zero_and_chooses_uniformly() -> None:
    router = make_router(4, E, name="noisy_topk")
    assert all((parameter == 0).all() for parameter in router.parameters())
    num_tokens = 6000
    counts_E = router(torch.randn(num_tokens, 4)).counts_E.double()
    chance = 2 / E
    sigma = (num_tokens * chance * (1 - chance)) ** 0.5
    assert (counts_E - num_tokens * chance).abs().max() < 5 * sigma
    for parameter in router.parameters():
        torch.nn.init.ones_(parameter)
    router.reset_parameters(0.02)
    assert all((parameter == 0).all() for parameter in router.parameters())


def test_noise_in_training_only_and_of_the_right_size() -> None:
    router = make_router(E, E, logits=True, name="noisy_topk", top_k=1, softmax_order="before", renormalize=False)
    with torch.no_grad():
        router.noise_weight.fill_(0.5)
    x_TD = torch.ones(20_000, E)
    noisy_TE, _ = router.perturb(x_TD, router.eval()(x_TD).logits_TE, None)
    assert torch.equal(noisy_TE, x_TD), "no noise in evaluation"
    noisy_TE, _ = router.train().perturb(x_TD, x_TD, None)
    std = F.softplus(torch.tensor(0.5 * E)).item()
    assert (noisy_TE - x_TD).mean().item() == pytest.approx(0, abs=5 * std / 20_000**0.5)
    assert (noisy_TE - x_TD).std().item() == pytest.approx(std, rel=0.02)
    assert not router.eval()(x_TD).aux_losses


def test_weights_are_the_softmax_over_the_chosen_noisy_logits() -> None:
    router = make_router(E, E, logits=True, name="noisy_topk", top_k=3)
    x_TD = torch.randn(30, E)
    torch.manual_seed(3)
    routing = router(x_TD)
    torch.manual_seed(3)
    noisy_TE = x_TD + torch.randn_like(x_TD) * F.softplus(torch.zeros(()))
    top = noisy_TE.topk(3)
    assert torch.equal(routing.expert_ids_N.view(30, 3), top.indices)
    torch.testing.assert_close(routing.weights_N.view(30, 3), top.values.softmax(-1))
    torch.testing.assert_close(routing.logits_TE, x_TD)
    torch.testing.assert_close(routing.probs_TE, x_TD.softmax(-1))


def test_losses_against_the_formulas() -> None:
    router = make_router(E, E, logits=True, name="noisy_topk", importance_coef=0.3, load_coef=0.7)
    with torch.no_grad():
        router.noise_weight.normal_()
    x_TD = torch.randn(30, E)
    torch.manual_seed(3)
    losses = router(x_TD).aux_losses
    torch.manual_seed(3)
    std_TE = F.softplus(x_TD @ router.noise_weight.T)
    noisy_TE = x_TD + torch.randn_like(x_TD) * std_TE
    importance, load = [0.0] * E, [0.0] * E
    for t in range(30):
        top = noisy_TE[t].topk(2)
        for gate, e in zip(top.values.softmax(-1).tolist(), top.indices.tolist(), strict=True):
            importance[e] += gate
        for e in range(E):
            others = sorted((noisy_TE[t, i].item() for i in range(E) if i != e), reverse=True)
            z = (x_TD[t, e].item() - others[1]) / std_TE[t, e].item()
            load[e] += 0.5 * (1 + torch.erf(torch.tensor(z / 2**0.5)).item())
    for name, sums, coef in (("importance", importance, 0.3), ("load", load, 0.7)):
        mean = sum(sums) / E
        expected = sum((s - mean) ** 2 for s in sums) / E / mean**2
        assert losses[name].value.item() == pytest.approx(expected, rel=1e-4), name
        assert losses[name].coef == coef


def test_the_noise_scale_and_the_gate_learn_from_the_load_loss() -> None:
    router = make_router(E, E, logits=True, name="noisy_topk")
    losses = router(torch.randn(30, E)).aux_losses
    losses["load"].value.backward(retain_graph=True)
    assert router.noise_weight.grad.abs().max() > 1e-4
    assert router.weight.grad.abs().max() > 1e-4
    router.zero_grad()
    losses["importance"].value.backward()
    assert router.weight.grad.abs().max() > 1e-4


def test_every_expert_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router.top_k=6 must be below num_experts=6.*load loss is undefined"):
        make_router(4, E, name="noisy_topk", top_k=6)
    with pytest.raises(ValueError, match=r"router.top_k=7 is more than num_experts=6"):
        make_router(4, E, name="noisy_topk", top_k=7)
