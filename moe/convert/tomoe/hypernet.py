"""ToMoE's hypernetwork: fixed random inputs -> bidirectional GRU over the layers -> expert embeddings -> scores of neurons.

One network for all layers ties their masks together while they are trained; afterwards only its masks are kept
(arXiv 2501.15316).

Legend: L layers, E experts, F neurons of a dense FFN, H embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import straight_through

INPUT, EMBEDDING = 32, 128


class HyperNetwork(nn.Module):
    """Scores of every neuron in every expert of every layer.

    Args:
        num_layers: L.
        num_experts: E.
        num_neurons: F.
        offset: added to the scores.
    """

    def __init__(self, num_layers: int, num_experts: int, num_neurons: int, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.inputs_LEI = nn.Buffer(torch.randn(num_layers, num_experts, INPUT))
        self.gru = nn.GRU(INPUT, EMBEDDING // 2, bidirectional=True)  # a sequence of L, a batch of E
        self.norms = nn.ModuleList(nn.LayerNorm(EMBEDDING) for _ in range(num_layers))
        self.decoders = nn.ModuleList(nn.Linear(EMBEDDING, num_neurons, bias=False) for _ in range(num_layers))

    def forward(self) -> Tensor:
        """(L, E, F) fp32; a neuron whose score is positive belongs to the expert."""
        with torch.autocast(self.inputs_LEI.device.type, enabled=False):
            embeddings_LEH, _ = self.gru(self.inputs_LEI)
            layers = zip(self.norms, self.decoders, embeddings_LEH, strict=True)
            return torch.stack([decode(F.gelu(norm(x_EH))) for norm, decode, x_EH in layers]) + self.offset


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent Gumbel(0, 1) noise of the shape of ``like``, drawn on the CPU so that a seed gives the same on any device."""
    exponential = torch.empty(like.shape).exponential_(generator=generator)
    return -exponential.clamp_min(1e-20).log().to(like.device)


def sample_masks(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Neurons on (1) or off (0), drawn with chances sigmoid(score), with the gradient of the tempered sigmoid.

    The noise is the difference of two Gumbel draws (logistic), whose median is 0, so that the masks without noise
    (score > 0) are the most likely ones. The released code adds one Gumbel draw, of median 0.37: its masks shrink when the
    noise is left out.
    """
    return hard_masks(scores + gumbel(scores, generator) - gumbel(scores, generator), temperature)


def hard_masks(scores: Tensor, temperature: float) -> Tensor:
    """Neurons of positive score, with the gradient of the tempered sigmoid."""
    return straight_through((scores > 0).to(scores.dtype), (scores / temperature).sigmoid())


def sample_choices(logits_TE: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(T, E) one-hot draws from softmax(logits), with the gradient of the tempered softmax."""
    soft_TE = ((logits_TE + gumbel(logits_TE, generator)) / temperature).softmax(-1)
    hard_TE = F.one_hot(soft_TE.argmax(-1), logits_TE.shape[-1]).to(soft_TE.dtype)
    return straight_through(hard_TE, soft_TE)
