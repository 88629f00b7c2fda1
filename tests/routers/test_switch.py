"""Switch: the full probability as weight, so that its router learns; jitter and initialisation as in the paper."""

import pytest
import torch
from helpers.routing import make_router

E = 8


def test_weight_is_the_full_probability_and_the_router_learns() -> None:
    router = make_router(E, E, logits=True, name="switch", jitter=0.0)
    x_TD = torch.randn(40, E, requires_grad=True)
    routing = router(x_TD)
    assert routing.top_k == 1
    probs_TE = x_TD.detach().softmax(-1)
    assert torch.equal(routing.expert_ids_N, probs_TE.argmax(-1))
    torch.testing.assert_close(routing.weights_N, probs_TE.max(-1).values)
    routing.weights_N.sum().backward()
    top_T1 = probs_TE.max(-1, keepdim=True).values
    expected_TE = -top_T1 * probs_TE + top_T1 * (probs_TE == top_T1)
    torch.testing.assert_close(x_TD.grad, expected_TE)
    assert router.weight.grad.abs().max() > 1e-2


def test_renormalised_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router.top_k=1 with renormalised weights"):
        make_router(E, E, name="switch", renormalize=True)


def test_default_jitter_of_the_paper() -> None:
    router = make_router(E, E, logits=True, name="switch")
    ratio_TE = router(torch.ones(500, E)).logits_TE
    assert 0.99 <= ratio_TE.min() < 0.9905
    assert 1.0095 < ratio_TE.max() <= 1.01
    assert torch.equal(router.eval()(torch.ones(5, E)).logits_TE, torch.ones(5, E))


def test_initialisation_of_table_3() -> None:
    router = make_router(1000, 64, name="switch")
    for std in (0.02, 5.0):  # whatever the model's own range
        router.reset_parameters(std)
        limit = 2 * (0.1 / 1000) ** 0.5
        assert router.weight.abs().max() <= limit
        assert router.weight.std().item() == pytest.approx(0.88 * limit / 2, rel=0.02)  # 0.88: truncated at 2 std
