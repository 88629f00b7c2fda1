"""What a neuron is worth once the others have taken over what they can of its work.

h^2 |wd|^2 counts a neuron whose activation others can imitate as high as one that nothing replaces. After a refit of the
down-projection only the part that nothing replaces is lost. So neurons are taken out one block at a time as in optimal brain
surgery (Hassibi and Stork, 1992) for a linear layer: with C the inverse of the hidden Gram matrix of the neurons still there,
taking out neuron j raises the squared error of the output by |wd_j|^2 / C_jj, and moves wd of the others along C_j.

Legend: D model, F neurons, n neurons of a block.
"""

import torch
from torch import Tensor

_DAMPING = 0.1  # of each diagonal entry: the refit's own caution about what one neuron can learn from others
_NUM_BLOCKS = 64


@torch.no_grad()
def saliencies(gram_FF: Tensor, down_DF: Tensor, num_kept: int) -> Tensor:
    """(F,) fp32 rise of the output's squared error when a neuron goes, at the time it goes; of the last ones, were it next.

    Args:
        gram_FF: sum over tokens of weight * h h^T.
        down_DF: dense down-projection.
        num_kept: neurons that are never taken out.
    """
    width = len(gram_FF)
    gram_FF = gram_FF.double()  # the blocks add up rounding errors
    diagonal_F = gram_FF.diagonal()
    damping_F = _DAMPING * diagonal_F + 1e-9 * diagonal_F.mean().clamp_min(1e-30)
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(gram_FF + torch.diag(damping_F)))
    down_FD = down_DF.T.to(torch.float64, copy=True)
    saliency_F = gram_FF.new_full((width,), torch.inf)
    there_F = torch.ones(width, dtype=torch.bool)
    num_left = width - num_kept
    block = -(-width // _NUM_BLOCKS)
    while num_left:
        now_F = _rise(inverse_FF, down_FD, there_F)
        gone_n = now_F.topk(min(block, num_left), largest=False).indices
        saliency_F[gone_n] = now_F[gone_n]
        there_F[gone_n] = False
        num_left -= len(gone_n)
        _take_out(inverse_FF, down_FD, gone_n)
    return torch.where(there_F, _rise(inverse_FF, down_FD, there_F), saliency_F).float()


def _rise(inverse_FF: Tensor, down_FD: Tensor, there_F: Tensor) -> Tensor:
    """(F,) of the neurons still there; infinite for the others."""
    rise_F = down_FD.square().sum(1) / inverse_FF.diagonal()
    return torch.where(there_F, rise_F, torch.inf)


def _take_out(inverse_FF: Tensor, down_FD: Tensor, gone_n: Tensor) -> None:
    """The inverse without the neurons (a Schur complement), and the down-projection that makes up for them, in place."""
    columns_Fn = inverse_FF[:, gone_n]
    factor_nn = torch.linalg.cholesky(columns_Fn[gone_n])
    down_FD -= columns_Fn @ torch.cholesky_solve(down_FD[gone_n], factor_nn)
    inverse_FF -= columns_Fn @ torch.cholesky_solve(columns_Fn.T, factor_nn)
    down_FD[gone_n] = 0
    inverse_FF[gone_n] = 0
    inverse_FF[:, gone_n] = 0
    inverse_FF[gone_n, gone_n] = 1
