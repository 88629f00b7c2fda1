"""Rounding of a router to 8 bits, so that it chooses as before: EAQuant's routing consistency alignment.

The router's weights get one asymmetric grid per expert whose range is clipped by a common ratio, the one with the least

    |x W - x Q(W)|^2 + sum over the m largest of p of p ln(p / q),  m = K + floor(alpha (E - K)),

per token, where p and q are the router's probabilities before and after (Fu et al., arXiv 2506.13329). The released code has
alpha 0 and leaves the first term out. Then the sum is no divergence but may be negative, and on a carved SmolLM2 it chose ranges
that kept fewer of a token's experts than the whole range did; so alpha is 1 here, and all experts count.

Servers keep routers as they are: only the simulated schemes, whose papers round everything, round them.

Legend: T tokens, D model, E experts, K top-k, m experts that count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.quant.grids import IntGrid, Rounded
from moe.quant.inputs import LayerInputs
from moe.quant.layer import moe_of
from moe.quant.scaling.find import router_matrices
from moe.routers import Router
from moe.types import Routing

GRID = IntGrid(bits=8, symmetric=False)
CLIPS = tuple(0.35 + 0.65 * step / 100 for step in range(101))
ALPHA = 1.0  # of the experts beyond the K best, the share that counts in the divergence
_MOST_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class RoundedRouter:
    """What became of a router.

    Attributes:
        rounded: its matrices by their names below the layer, such as ``mlp.router.weight``.
        clip: the ratio that was chosen.
        error: mean over tokens of the squared error of the logits.
        divergence: mean over tokens of the divergence on the m largest probabilities.
    """

    rounded: dict[str, Rounded]
    clip: float
    error: float
    divergence: float


@torch.no_grad()
def align_router(
    layer: nn.Module,
    inputs: LayerInputs,
    clips: Sequence[float] = CLIPS,
    alpha: float = ALPHA,
    stored: torch.dtype = torch.float32,
) -> RoundedRouter | None:
    """Round the router of a layer in place.

    Args:
        layer: fp32, in evaluation.
        inputs: that the MoE sees.
        clips: ratios to choose from; ``(1.0,)`` rounds without alignment.
        alpha: see the module.
        stored: dtype of the scales in a checkpoint.

    Returns:
        ``None`` for a dense layer, and for a router without weights (by hashes) or without logits.
    """
    moe = moe_of(layer)
    if moe is None or not router_matrices(moe.router):
        return None
    x_TD = inputs.calibration_TD
    x_TD = x_TD[:: max(1, -(-len(x_TD) // _MOST_ROWS))]
    before = {name: weight.data.clone() for name, weight in router_matrices(moe.router).items()}
    reference = _route(moe.router, x_TD)
    if reference.logits_TE is None:
        return None
    num_counted = _num_counted(moe.router, alpha)
    best: RoundedRouter | None = None
    for clip in clips:
        rounded = {name: GRID.round(weight, GRID.scales(weight, stored, clip)) for name, weight in before.items()}
        _put(moe.router, rounded)
        found = _route(moe.router, x_TD)
        assert found.logits_TE is not None
        error = float((found.logits_TE - reference.logits_TE).square().sum(-1).mean())
        divergence = float(top_divergence(_probs(moe.router, reference), _probs(moe.router, found), num_counted))
        if best is None or error + divergence < best.error + best.divergence:
            best = RoundedRouter(rounded=rounded, clip=clip, error=error, divergence=divergence)
    assert best is not None, "clips must not be empty"
    _put(moe.router, best.rounded)
    return RoundedRouter(
        rounded={f"mlp.router.{name}": matrix for name, matrix in best.rounded.items()},
        clip=best.clip,
        error=best.error,
        divergence=best.divergence,
    )


def top_divergence(p_TE: Tensor, q_TE: Tensor, num_counted: int) -> Tensor:
    """Mean over tokens of the sum of p ln(p / q) over the m largest of p, which are not renormalised: ().

    It may be negative, where q gives them more than p does.
    """
    top_Tm, experts_Tm = p_TE.topk(num_counted, dim=-1)
    least = torch.finfo(p_TE.dtype).tiny
    ratio_Tm = top_Tm.clamp_min(least).log() - q_TE.gather(1, experts_Tm).clamp_min(least).log()
    return (top_Tm * ratio_Tm).sum(-1).mean()


def _num_counted(router: Router, alpha: float) -> int:
    """m."""
    top_k = min(max(math.ceil(router.mean_experts_per_token), 1), router.num_experts)
    return top_k + math.floor(alpha * (router.num_experts - top_k))


def _route(router: Router, x_TD: Tensor) -> Routing:
    routing = router(x_TD)
    assert isinstance(routing, Routing), "soft routers are refused before"
    return routing


def _probs(router: Router, routing: Routing) -> Tensor:
    """(T, E) of the router's own kind; float64, as routers of converted models may have logits of 1e-3 that hardly differ."""
    assert routing.logits_TE is not None
    logits_TE = routing.logits_TE.double()
    if getattr(router.config, "score", "softmax") == "softmax":
        return logits_TE.softmax(-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def _put(router: Router, rounded: dict[str, Rounded]) -> None:
    for name, matrix in rounded.items():
        router.get_parameter(name).data.copy_(matrix.dequantize())
