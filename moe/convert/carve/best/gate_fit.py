"""A linear gate for given experts: one logistic regression per expert, of whether the token needs it among its K.

Tokens count by what a wrong choice costs: the distance of the expert's energy from the border between the K-th and the next. The
problem is convex; L-BFGS stops early, which with the small penalty is all the regularisation it needs.

Legend: T tokens, D model, R routed experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.best.grouping import spread
from moe.convert.carve.gates import best
from moe.convert.carve.types import LinearGate

_ITERATIONS = 20
_PENALTY = 1e-3


def fit_gate(energy_TR: Tensor, x_TD: Tensor, top_k: int) -> LinearGate:
    """Gate whose K best experts hold as much of a token's energy as a linear one can see.

    Args:
        energy_TR: what a token loses without each expert.
        x_TD: inputs of the FFN.
        top_k: K.
    """
    num_routed, dim = energy_TR.shape[1], x_TD.shape[1]
    ranked_TR = energy_TR.sort(1, descending=True).values
    border_T1 = ranked_TR[:, top_k - 1 : top_k + 1].mean(1, keepdim=True)
    stakes_TR = (energy_TR - border_T1).abs()
    stakes_TR = stakes_TR / stakes_TR.mean().clamp_min(torch.finfo(stakes_TR.dtype).tiny)
    wanted_TR = best(energy_TR, top_k).to(x_TD.dtype)
    mean_D = x_TD.mean(0)
    spread_D = spread(x_TD)
    unit_TD = (x_TD - mean_D) / spread_D

    weight_DR = x_TD.new_zeros(dim, num_routed, requires_grad=True)
    bias_R = x_TD.new_zeros(num_routed, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_DR, bias_R], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            each_TR = F.binary_cross_entropy_with_logits(unit_TD @ weight_DR + bias_R, wanted_TR, reduction="none")
            value = (each_TR * stakes_TR).mean() + _PENALTY * weight_DR.square().sum(0).mean()
        value.backward()
        return value.detach()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight_RD = (weight_DR.detach() / spread_D[:, None]).T.contiguous()
    return LinearGate(weight_RD=weight_RD, bias_R=bias_R.detach() - weight_RD @ mean_D)
