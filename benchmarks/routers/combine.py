"""Any router on any experts: the parts of a benchmark use routers through their module interface, without `MoELayer`.

Legend: T tokens, X width of what an expert reads, O width of what it returns, E experts, G groups, M tokens of a group,
S slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe.routers import Router, StepLoad
from moe.routers.balance import update_bias
from moe.types import Routing, SoftRouting

# Rows of tokens (n, X) to the output (n, O) of expert number e.
Experts = Callable[[int, Tensor], Tensor]


def apply_experts(x_TX: Tensor, routing: Routing | SoftRouting, experts: Experts) -> Tensor:
    """(T, O): the weighted sum of each token's experts; only listed pairs of token and expert are evaluated."""
    if isinstance(routing, SoftRouting):
        return _apply_soft(x_TX, routing, experts)
    parts, token_ids = [], []
    for expert in range(routing.num_experts):
        mine = (routing.expert_ids_N == expert).nonzero()[:, 0]
        ids = routing.token_ids_N[mine]
        parts.append(experts(expert, x_TX[ids]) * routing.weights_N[mine, None])
        token_ids.append(ids)
    y_NO = torch.cat(parts)
    return y_NO.new_zeros(x_TX.shape[0], y_NO.shape[1]).index_add(0, torch.cat(token_ids), y_NO)


def _apply_soft(x_TX: Tensor, routing: SoftRouting, experts: Experts) -> Tensor:
    x_GMX = x_TX[_tokens(routing)]
    slots_GSX = routing.dispatch_GMS.transpose(1, 2) @ x_GMX
    slots_GEsX = slots_GSX.unflatten(1, (routing.num_experts, -1))
    out = [experts(expert, slots_GEsX[:, expert].flatten(0, 1)) for expert in range(routing.num_experts)]
    out_GSO = torch.stack([part.unflatten(0, (len(slots_GEsX), -1)) for part in out], 1).flatten(1, 2)
    y_GMO = routing.combine_GMS @ out_GSO
    y_TO = y_GMO.new_zeros(x_TX.shape[0], y_GMO.shape[-1])
    return y_TO.index_add(0, _tokens(routing).flatten(), y_GMO.flatten(0, 1))


def _tokens(routing: SoftRouting) -> Tensor:
    if routing.token_ids_GM is not None:
        return routing.token_ids_GM
    num_groups, num_members, _ = routing.dispatch_GMS.shape
    return torch.arange(num_groups * num_members, device=routing.dispatch_GMS.device).view(num_groups, num_members)


def weight_matrix(routing: Routing | SoftRouting, num_tokens: int) -> Tensor:
    """(T, E) weight of each expert in each token's result; of a soft routing, the sum over the expert's slots."""
    if isinstance(routing, SoftRouting):
        weights_GME = routing.combine_GMS.unflatten(2, (routing.num_experts, -1)).sum(3)
        empty_TE = weights_GME.new_zeros(num_tokens, routing.num_experts)
        return empty_TE.index_add(0, _tokens(routing).flatten(), weights_GME.flatten(0, 1))
    empty_TE = routing.weights_N.new_zeros(num_tokens, routing.num_experts)
    return empty_TE.index_put((routing.token_ids_N, routing.expert_ids_N), routing.weights_N, accumulate=True)


def evaluations(routing: Routing | SoftRouting, num_tokens: int) -> float:
    """Expert evaluations per token of this routing."""
    if isinstance(routing, SoftRouting):
        num_groups, _, num_slots = routing.dispatch_GMS.shape
        return num_groups * num_slots / max(num_tokens, 1)
    return routing.expert_ids_N.numel() / max(num_tokens, 1)


def own_losses(routing: Routing | SoftRouting) -> Tensor | float:
    """The router's own losses with their factors; the Switch loss is a layer's, and not among them."""
    return sum((loss.coef * loss.value for loss in routing.aux_losses.values()), start=0.0)


@torch.no_grad()
def finish_step(router: Router, routing: Routing | SoftRouting, num_tokens: int, bias_update_rate: float = 0.0) -> None:
    """What a layer does after an optimizer step: move the selection bias, schedules and controllers."""
    if isinstance(routing, SoftRouting):
        num_groups, _, num_slots = routing.dispatch_GMS.shape
        counts_E = torch.full((routing.num_experts,), num_groups * num_slots // routing.num_experts)
    else:
        counts_E = routing.counts_E
    if bias_update_rate:
        update_bias(router.get_buffer("bias_E"), counts_E, bias_update_rate)
    density = counts_E.sum() / max(num_tokens * routing.num_experts, 1)
    router.after_step(StepLoad(counts_E=counts_E, model_density=density, reduce=lambda tensor: tensor))
