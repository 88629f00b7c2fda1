"""EAQuant's expert-aware smoothing (Fu et al., arXiv 2506.13329).

Behind the norm of an MoE each expert i has a scale of its own, from the tokens that it gets and from its own weights,

    s^i_j = max|x^i_j|^alpha / max|W^i_j|^(1 - alpha),  alpha 0.6,

and the norm takes the largest: s_j = max(max_i s^i_j, s^router_j, s^shared_j), the last two by the same formula. Experts that no
token reaches are left out. Before they are compared each reader's scales are divided by their geometric mean, which the paper does
not do: any multiple of a scale is as good, and without this a reader whose weights are small as a whole, such as a carved model's
router, decides every channel (error of four layers of a carved SmolLM2 with a rounded router: w4a4 0.203 instead of 0.253, w3a4
0.468 instead of 0.593).

q, k and v together get the formula of one matrix, and so does o where no heads share values.
Of down-projections only outlier channels are scaled, by (largest value / largest value of a channel that is none)^0.7. An outlier
lies above the 65 % quantile by more than 1.5 times the distance of the 35 % and 65 % quantiles.

The router's term is for a router that is rounded: at w4a4 on two layers of a carved SmolLM2, 98 and 97 % of the tokens kept all
their experts through 8 bits with it, 84 and 50 % without. A router that servers keep as it is goes without: there the term raised
the error of five layers from 0.123 to 0.151 of their output (geometric mean). The released code leaves it out by default, though
the paper has it.

That code looks for outliers among the positive and the negative values by themselves, and cuts the outliers found once more
where the gap between two of them is widest; on the same model this made no clear difference.

Legend: Q columns, S scales of a site.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe.quant.scaling.sites import Site
from moe.quant.scaling.smoothquant import balance, largest_input, largest_weight
from moe.quant.schemes import Scheme

ALPHA = 0.6
DOWN_EXPONENT = 0.7
QUANTILES = (0.35, 0.65)
OUTLIER_DISTANCES = 1.5


def scale(site: Site, scheme: Scheme, stored: torch.dtype) -> Tensor | None:
    """(S,) scales of a site; ``None`` leaves it."""
    return _RULES[site.kind](site)


def _merged(site: Site) -> Tensor | None:
    """The largest of all readers' own scales, each in units of its geometric mean."""
    scales = [
        balance(site, most_Q, largest_weight(reader), ALPHA)
        for reader in site.readers
        if (reader.is_quantized or reader.is_rounded_router) and (most_Q := largest_input(reader)) is not None
    ]
    return torch.stack([scale_S / scale_S.log().mean().exp() for scale_S in scales]).amax(0) if scales else None


def _as_one(site: Site) -> Tensor | None:
    """Readers of the same rows as one matrix."""
    if site.scale_of_Q is not None:
        return None  # with grouped queries it did not help
    most_Q = largest_input(site.readers[0])
    if most_Q is None:
        return None
    weight_Q = torch.stack([largest_weight(reader) for reader in site.readers]).amax(0)
    return balance(site, most_Q, weight_Q, ALPHA)


def _outliers(site: Site) -> Tensor | None:
    """Outliers down towards the largest of the others."""
    most_Q = largest_input(site.readers[0])
    if most_Q is None:
        return None
    low, high = torch.quantile(most_Q, most_Q.new_tensor(QUANTILES))
    is_outlier_Q = most_Q > high + OUTLIER_DISTANCES * (high - low)
    normal = most_Q[~is_outlier_Q].max()
    if not is_outlier_Q.any() or normal <= 0:
        return None
    return torch.where(is_outlier_Q, (most_Q / normal) ** DOWN_EXPONENT, 1.0)


_RULES: dict[str, Callable[[Site], Tensor | None]] = {
    "attention": _as_one,
    "value": _as_one,
    "dense": _as_one,
    "moe": _merged,
    "up": _outliers,
}
