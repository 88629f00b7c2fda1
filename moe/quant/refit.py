"""Refit of a router to the inputs that it sees in the quantised model.

Layers below leave an error in the residual stream, so a router that is kept as it is chooses other experts than before. The gate
that gives the old logits on the new inputs is a ridge regression toward the old gate,

    min over W' of |x' W' - x W|^2 + share |(W' - W) diag(x'^T x')^(1/2)|^2,

with x the inputs in the model as it was and x' in the quantised one, on the same text. Servers read the result as any router.

Legend: T tokens, D model, E experts.
"""

import torch
from torch import Tensor

from moe.convert.carve.ridge import solve_ridge
from moe.routers.topk import TopKRouter

SHARE = 0.1  # of each input's own energy


@torch.no_grad()
def refit_router(router: TopKRouter, x_TD: Tensor, logits_TE: Tensor, share: float = SHARE) -> None:
    """Fit the gate in place.

    Args:
        router: a linear gate, fp32.
        x_TD: its inputs in the quantised model.
        logits_TE: its logits in the model as it was, on the same tokens.
        share: of the penalty.
    """
    assert type(router).logits is TopKRouter.logits, "the gate is not linear"
    x_TD, weight_ED = x_TD.double(), router.weight.data.double()
    missing_TE = logits_TE.double() - x_TD @ weight_ED.T
    change_DE = solve_ridge(x_TD.T @ x_TD, x_TD.T @ missing_TE, share)
    router.weight.data.copy_(weight_ED + change_DE.T)
