"""One token's router gradient by enumeration, in float64: what a router draws is summed over, and nothing is estimated.

The token has E experts with outputs E_i, of which the last is masked, and a loss f of its mixture's output.

Legend: E experts, D model, O outcomes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe.routers.sparsemixer import Rule, masked_softmax, rule_weights

Loss = Callable[[Tensor], Tensor]  # (O, D) -> (O,)

E = 5
LOGITS_E = torch.tensor([0.3, -0.8, 1.1, 0.9, -2.0], dtype=torch.float64)
KEPT_E = torch.tensor([True, True, True, True, False])
BEST = 2
EXPERTS_ED = torch.randn(E, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def polynomial(degree: int, seed: int = 0) -> Loss:
    """A random polynomial of the output with all its lower terms and a constant."""
    coefs_KD = torch.randn(degree, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def loss(y_OD: Tensor) -> Tensor:
        return 0.7 + sum((y_OD @ coef_D) ** (k + 1) for k, coef_D in enumerate(coefs_KD))

    return loss


def gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
    """(E,) gradient of a () value of the token's probabilities with respect to its logits."""
    leaf_E = LOGITS_E.clone().requires_grad_()
    (grad_E,) = torch.autograd.grad(value(masked_softmax(leaf_E, KEPT_E)), leaf_E)
    return grad_E


def exact(loss: Loss, hold_weight: bool = False) -> Tensor:
    """Gradient of sum_i p_i f(p_i E_i), what sampled routing minimises; ``hold_weight``: the p_i inside f is a constant."""

    def value(probs_E: Tensor) -> Tensor:
        inside_E = probs_E.detach() if hold_weight else probs_E
        return (probs_E * loss(inside_E[:, None] * EXPERTS_ED)).sum()

    return gradient(value)


def expected(loss: Loss, rule: Rule, argmax_rule: bool = False) -> Tensor:
    """Expectation of a SparseMixer gradient: the sum over D and B of probability times gradient."""
    chances_E, total_E = masked_softmax(LOGITS_E, KEPT_E), torch.zeros(E, dtype=torch.float64)
    for drawn in range(E):
        for full, chance in ((True, rule.full_chance), (False, 1 - rule.full_chance)):
            is_full = torch.tensor([full or (argmax_rule and drawn == BEST)])

            def value(probs_E: Tensor, drawn: int = drawn, is_full: Tensor = is_full) -> Tensor:
                weight_T = rule_weights(probs_E[drawn : drawn + 1], is_full, rule)
                return loss(weight_T[:, None] * EXPERTS_ED[drawn]).sum()

            total_E += chances_E[drawn] * chance * gradient(value)
    return total_E


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return ((got - expected).norm() / expected.norm()).item()
