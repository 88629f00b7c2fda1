"""Scaling of channels before rounding, by the name that ``--method`` uses.

A scaler looks at one site (`moe.quant.scaling.sites`) and says by what to divide its channels. Folding that into the weights leaves
the layer's function as it was, so every server runs the result. Adding one: a file here, a line in `SCALERS`, a test.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.quant.inputs import LayerInputs
from moe.quant.scaling import awq, eaquant, smoothquant
from moe.quant.scaling.find import find_sites
from moe.quant.scaling.sites import Site
from moe.quant.schemes import Scheme

# (S,) positive scales of a site, by which what makes its channels is divided; ``None`` leaves it as it is.
Scaler = Callable[[Site, Scheme, torch.dtype], Tensor | None]

SCALERS: dict[str, Scaler] = {
    "smoothquant": smoothquant.scale,
    "awq": awq.scale,
    "eaquant": eaquant.scale,
}


@torch.no_grad()
def scale_layer(
    layer: nn.Module,
    inputs: LayerInputs,
    scaling: str,
    scheme: Scheme,
    stored: torch.dtype,
    *,
    rounds_router: bool,
) -> list[str]:
    """Scale a decoder layer's channels in place; what it computes stays.

    Args:
        layer: fp32, in evaluation.
        inputs: captured in it, each linear's rows in the order of the text; scaled along, in place.
        scaling: a key of `SCALERS`.
        scheme: that the layer is going to be rounded to.
        stored: dtype of norms in the checkpoint; scales are chosen so that they need no rounding.
        rounds_router: whether `align_router` comes after.

    Returns:
        What was not scaled, and why.
    """
    sites = find_sites(layer, inputs, rounds_router)
    for site in sites.found:
        scale_S = SCALERS[scaling](site, scheme, stored)
        if scale_S is not None:
            site.fold(scale_S, stored)
    return sites.notes


__all__ = ["SCALERS", "Scaler", "scale_layer"]
