"""SmoothQuant (Xiao et al., arXiv 2211.10438 eq. 4): s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), alpha 0.5.

The ranges of a channel in the activations and in the weights come half-way together. As in the paper only behind norms. In an MoE
the maxima are over all tokens and over the weights of all experts and the shared ones.

Legend: Q columns, S scales of a site.
"""

import torch
from torch import Tensor

from moe.quant.scaling.sites import Reader, Site
from moe.quant.schemes import Scheme

ALPHA = 0.5
LEAST = 1e-5  # of both maxima, so that a channel that is always zero has a scale


def scale(site: Site, scheme: Scheme, stored: torch.dtype) -> Tensor | None:
    """(S,) scales of a site; ``None`` leaves it."""
    if site.kind not in ("attention", "dense", "moe"):
        return None
    quantized = [reader for reader in site.readers if reader.is_quantized]
    found = [one_Q for reader in quantized if (one_Q := largest_input(reader)) is not None]
    if not found:
        return None
    most_Q = torch.stack(found).amax(0)
    weight_Q = torch.stack([largest_weight(reader) for reader in quantized]).amax(0)
    return balance(site, most_Q, weight_Q, ALPHA)


def balance(site: Site, input_Q: Tensor, weight_Q: Tensor, alpha: float) -> Tensor:
    """(S,) eq. 4 from the largest inputs and weights of each column."""
    input_S, weight_S = site.largest(input_Q).clamp_min(LEAST), site.largest(weight_Q).clamp_min(LEAST)
    return (input_S**alpha / weight_S ** (1 - alpha)).clamp_min(LEAST)


def largest_input(reader: Reader) -> Tensor | None:
    """(Q,) largest magnitude of each column's input; ``None`` for an expert that no row reaches."""
    x_nQ = reader.rows().x_nQ
    return torch.linalg.vector_norm(x_nQ, float("inf"), dim=0) if len(x_nQ) else None


def largest_weight(reader: Reader) -> Tensor:
    """(Q,) largest magnitude of each column's weights."""
    return torch.linalg.vector_norm(reader.weight_PQ, float("inf"), dim=0)
