"""Ridge regression whose penalty follows each input's own scale.

Legend: I inputs, O outputs.
"""

import torch
from torch import Tensor


def solve_ridge(gram_II: Tensor, cross_IO: Tensor, share: float) -> Tensor:
    """(I, O) least-squares solution; the penalty of an input is ``share`` of its diagonal entry of the Gram matrix.

    So the result does not depend on the inputs' units. An input that is always zero gets zero.

    Args:
        gram_II: X^T X.
        cross_IO: X^T Y.
        share: of each diagonal entry, above 0.
    """
    scale_I = gram_II.diagonal().sqrt()
    scale_I = torch.where(scale_I > 0, scale_I, 1.0)
    correlation_II = gram_II / scale_I[:, None] / scale_I
    correlation_II.diagonal().copy_(torch.full_like(scale_I, 1 + share))  # of inputs that are always zero, too
    factor_II = torch.linalg.cholesky(correlation_II)
    return torch.cholesky_solve(cross_IO / scale_I[:, None], factor_II) / scale_I[:, None]
