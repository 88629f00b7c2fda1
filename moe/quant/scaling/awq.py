"""AWQ (Lin et al., arXiv 2306.00978 eq. 4-5): s_j = mean|X_j|^alpha, alpha from a grid by the error of the quantised products.

The error of a site is that of all matrices that read it together, on a subset of their rows: behind the norm before an MoE of the
shared experts and of every expert with its own tokens, each token by its combine weight. Scales are divided by the geometric mean
of the largest and the smallest. Where a scheme rounds activations they are rounded in the search as well. alpha = 0 is no scaling.

Legend: P output rows, Q columns, S scales of a site, n rows.
"""

import torch
from torch import Tensor

from moe.quant.scaling.sites import Reader, Site
from moe.quant.schemes import Scheme

NUM_ALPHAS = 20
_LEAST = 1e-4  # of a scale before it is normalised
_ROWS = 256  # of each matrix that the error is measured on


def scale(site: Site, scheme: Scheme, stored: torch.dtype) -> Tensor | None:
    """(S,) scales of a site; ``None`` leaves it."""
    readers = [_Sample(reader) for reader in site.readers if reader.is_quantized]
    readers = [reader for reader in readers if len(reader.x_nQ)]
    if not readers:
        return None
    total_Q = torch.stack([reader.sum_Q for reader in readers]).sum(0)
    mean_S = site.mean(total_Q / sum(reader.num_rows for reader in readers))
    best, least = None, float("inf")
    for step in range(NUM_ALPHAS):
        scale_S = mean_S.pow(step / NUM_ALPHAS).clamp_min(_LEAST)
        scale_S = scale_S / (scale_S.max() * scale_S.min()).sqrt()
        error = sum(reader.error(site.columns(scale_S), scheme, stored) for reader in readers)
        if error < least:
            best, least = scale_S, error
    return best


class _Sample:
    """A matrix, evenly spread rows of its input, and their products."""

    def __init__(self, reader: Reader) -> None:
        rows = reader.rows()
        self.num_rows, self.sum_Q = len(rows.x_nQ), rows.x_nQ.abs().sum(0)
        step = max(1, -(-self.num_rows // _ROWS))
        self.x_nQ, self.weights_n = rows.x_nQ[::step], rows.weights_n[::step]
        self.share = self.num_rows / max(len(self.x_nQ), 1)
        self.weight_PQ = reader.weight_PQ.float()
        self.y_nP = self.x_nQ @ self.weight_PQ.T

    def error(self, scale_Q: Tensor, scheme: Scheme, stored: torch.dtype) -> float:
        """Squared error of the products with this scale."""
        x_nQ = self.x_nQ / scale_Q
        if scheme.activations is not None:
            x_nQ = scheme.activations.simulate(x_nQ)
        weight_PQ = scheme.weights.nearest(self.weight_PQ * scale_Q, stored).dequantize()
        return self.share * float(self.weights_n.square() @ (x_nQ @ weight_PQ.T - self.y_nP).square().sum(-1))
