"""What ToMoE minimises besides the distance to the dense model (arXiv 2501.15316), as pure functions.

Legend: T tokens, L layers, E experts, F neurons.
"""

from torch import Tensor

from moe.routers.losses import count_assignments, switch_loss

_EPS = 1e-3  # of the released code: no logarithm of zero


def size(masks_LEF: Tensor, active_share: float) -> Tensor:
    """R_param: mean over layers of |ln(width / (p F))|, with the width of a layer's widest expert.

    The paper takes one ratio, of the sums over layers, so that layers share a budget and come out of different widths. The
    architectures that servers load have one expert width: whatever a layer saves would be lost to padding. So each layer has
    the whole ratio here.
    """
    widest_L = masks_LEF.sum(-1).amax(-1) / masks_LEF.shape[-1]
    return ((widest_L + _EPS) / (active_share + _EPS)).log().abs().mean()


def union(masks_LEF: Tensor) -> Tensor:
    """R_union: mean over layers of |ln of the share of neurons that are in some expert|; 0 when all are."""
    covered_LF = 1 - (1 - masks_LEF).prod(1)
    return ((covered_LF.mean(-1) + _EPS) / (1 + _EPS)).log().abs().mean()


def balance(logits_TE: Tensor) -> Tensor:
    """R_bal: the Switch loss of the noiseless router, 1 at perfect balance.

    Loads and probabilities are those without Gumbel noise, since that is the router that stays. The released code takes the
    noisy one-hot choices for both, averaged over the windows of a batch at each position: with its batch of one
    window this is 1 for any router.
    """
    counts_E = count_assignments(logits_TE.detach().argmax(-1), logits_TE.shape[-1])
    return switch_loss(logits_TE.softmax(-1), counts_E)
