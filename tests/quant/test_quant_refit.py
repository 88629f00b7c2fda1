"""A router's refit undoes what quantised layers below do to its inputs, as far as it is linear."""

import torch

from moe.quant.refit import refit_router
from moe.routers.topk import TopKConfig, TopKRouter

T, D, E = 400, 16, 6


def router_and_inputs() -> tuple[TopKRouter, torch.Tensor]:
    torch.manual_seed(0)
    return TopKRouter(D, E, TopKConfig(top_k=2)), torch.randn(T, D) @ torch.randn(D, D)


def agreement(router: TopKRouter, x_TD: torch.Tensor, other: torch.Tensor) -> float:
    return float((router(x_TD).expert_ids_N.view(T, 2).sort(-1).values == other).all(-1).float().mean())


def test_it_minimises_the_penalised_error() -> None:
    router, x_TD = router_and_inputs()
    target_TE, old_ED = router(x_TD).logits_TE.detach(), router.weight.data.clone()
    seen_TD = x_TD + 0.3 * torch.randn(T, D)
    refit_router(router, seen_TD, target_TE, share=0.2)
    weight_ED = router.weight.data.double().requires_grad_()
    seen_TD = seen_TD.double()
    penalty = ((weight_ED - old_ED).square() * seen_TD.square().sum(0)).sum()
    loss = (seen_TD @ weight_ED.T - target_TE).square().sum() + 0.2 * penalty
    (gradient_ED,) = torch.autograd.grad(loss, weight_ED)
    assert gradient_ED.abs().max() < 1e-3 * (seen_TD.T @ target_TE.double()).abs().max()


def test_it_restores_choices_after_a_linear_change() -> None:
    router, x_TD = router_and_inputs()
    before = router(x_TD)
    chosen = before.expert_ids_N.view(T, 2).sort(-1).values
    seen_TD = x_TD @ (torch.eye(D) + 0.2 * torch.randn(D, D))
    worse = agreement(router, seen_TD, chosen)
    refit_router(router, seen_TD, before.logits_TE.detach(), share=1e-6)
    assert worse < 0.9 < 0.99 < agreement(router, seen_TD, chosen)


def test_inputs_that_stay_leave_the_router() -> None:
    router, x_TD = router_and_inputs()
    old_ED = router.weight.data.clone()
    refit_router(router, x_TD, router(x_TD).logits_TE.detach())
    torch.testing.assert_close(router.weight.data, old_ED, rtol=1e-5, atol=1e-6)
