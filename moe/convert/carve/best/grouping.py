"""Which neurons share an expert: alternate between the tokens of an expert and its neurons.

Given experts, a linear gate that predicts their energies says which tokens each would get; given those tokens, a neuron is worth
in an expert the energy it has on them, and in the shared one its energy on all tokens. Every step is the exact optimum of
one half while the other is held (the second a balanced assignment), so what the gate can see decides who belongs together.

Legend: T tokens, D model, F neurons, R routed experts, m neurons of an expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.convert.carve.gates import best
from moe.convert.carve.ridge import solve_ridge
from moe.convert.carve.types import CarveShape
from moe.convert.carve.weaver import balanced_kmeans
from moe.routers.assignment import balanced_assignment

_ROUNDS = 8
_STARTS = 4
_RIDGE = 1e-2  # of each input's variance


@torch.no_grad()
def group_neurons(energy_TF: Tensor, x_TD: Tensor, shape: CarveShape, generator: torch.Generator) -> Tensor:
    """(F,) int64 routed expert of each neuron, or R for a shared one: the best of a few starts.

    Args:
        energy_TF: what of a token's output a neuron accounts for.
        x_TD: inputs of the FFN.
        shape: numbers of experts; they divide F.
        generator: draws where k-means starts.
    """
    predictor = _Predictor(x_TD)
    found = [_group_once(energy_TF, predictor, shape, generator) for _ in range(_STARTS)]
    return min(found, key=lambda grouping: grouping.missed).expert_F


@dataclass(frozen=True, kw_only=True)
class _Grouping:
    """Expert of each neuron, and the energy that tokens miss under the gate that predicted it last."""

    expert_F: Tensor
    missed: float


def _group_once(energy_TF: Tensor, predictor: "_Predictor", shape: CarveShape, generator: torch.Generator) -> _Grouping:
    """From one start to where nothing changes, or for so many rounds."""
    expert_F = _start(energy_TF, predictor, shape, generator)
    # Shared experts are one column each, since all columns of the assignment have the same room.
    of_column = torch.tensor([*range(shape.num_routed), *[shape.num_routed] * shape.num_shared])
    for _ in range(_ROUNDS):
        mask_TR = best(predictor(_sums(energy_TF, expert_F, shape.num_routed).sqrt()), shape.top_k)
        runs_TE = torch.cat((mask_TR, mask_TR.new_ones(len(mask_TR), 1)), 1).to(energy_TF.dtype)
        # What a neuron misses. Not what it gets: all its columns would be near its energy, and rounding would decide.
        missed_FE = energy_TF.T @ (1 - runs_TE)
        before_F, expert_F = expert_F, of_column[balanced_assignment(-missed_FE[:, of_column])]
        if torch.equal(expert_F, before_F):
            break
    return _Grouping(expert_F=expert_F, missed=float(missed_FE.gather(1, expert_F[:, None]).sum()))


def _sums(energy_TF: Tensor, expert_F: Tensor, num_routed: int) -> Tensor:
    """(T, R) summed over the neurons of each routed expert."""
    return energy_TF @ F.one_hot(expert_F, num_routed + 1)[:, :num_routed].to(energy_TF.dtype)


def spread(x_TD: Tensor) -> Tensor:
    """(D,) standard deviation of each input; infinite for one that is constant to rounding, so that dividing by it drops it."""
    spread_D = x_TD.std(0, correction=0)
    return torch.where(spread_D > 1e-6 * x_TD.square().mean(0).sqrt(), spread_D, torch.inf)


class _Predictor:
    """Ridge regression on the tokens' inputs, each in units of its own spread.

    Else the slopes' direction would be that of the input that varies least: one that hardly ever moves has the largest slope.
    """

    def __init__(self, x_TD: Tensor) -> None:
        self.x_TD = (x_TD - x_TD.mean(0)) / spread(x_TD)
        self._gram_DD = self.x_TD.T @ self.x_TD

    def fit(self, target_TO: Tensor) -> Tensor:
        """(D, O) slopes: change of the target per spread of an input."""
        return solve_ridge(self._gram_DD, self.x_TD.T @ target_TO, _RIDGE)

    def __call__(self, target_TO: Tensor) -> Tensor:
        """(T, O) what is predicted of the target."""
        return self.x_TD @ self.fit(target_TO) + target_TO.mean(0)


def _start(energy_TF: Tensor, predictor: _Predictor, shape: CarveShape, generator: torch.Generator) -> Tensor:
    """Shared: the most energy. The others: balanced k-means on the direction of x along which their activation grows."""
    order_F = energy_TF.sum(0).argsort(descending=True, stable=True)
    rest_M = order_F[shape.num_shared * shape.check(len(order_F)) :]
    slopes_MD = F.normalize(predictor.fit(energy_TF[:, rest_M].sqrt()).T, dim=1)
    expert_F = torch.full_like(order_F, shape.num_routed)
    expert_F[rest_M] = balanced_kmeans(slopes_MD, shape.num_routed, generator)
    return expert_F
