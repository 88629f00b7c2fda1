"""GG MoE for tables (Chernov 2025, arXiv 2502.03608): an MLP cut into experts of the same total width, with a Gumbel-softmax gate.

All experts run on every row; an expert is a whole MLP of width d_block / E with its own output layer, without biases, so that an
MoE of the same d_block has fewer parameters than the MLP: hidden layers have E * (d_block / E)^2 weights instead of d_block^2.
The gate is one linear layer on the input. In training it draws one Gumbel-softmax sample per row, in evaluation it averages
over 10. The plain MoE is the same model with the gate's softmax instead of a sample.

After the authors' released code (weights uniform within 1 / sqrt(fan-out), dropout inside the experts); its embeddings of numerical
features, with which the paper's results are best, are left out here for all models.

Legend: T rows, D features, E experts, F = d_block / E, O outputs.
"""

import itertools

import torch
from torch import Tensor, nn

from benchmarks.routers.combine import weight_matrix
from moe.routers import parse_router

NUM_EXPERTS, NUM_BLOCKS, DROPOUT = 8, 2, 0.1


class TableMoE(nn.Module):
    """Mixture of small MLPs on table rows.

    Args:
        dim: D.
        num_outputs: O.
        d_block: width of all experts together.
        sampled: draw the gate in training (GG MoE), or use its softmax.
    """

    def __init__(self, dim: int, num_outputs: int, d_block: int, sampled: bool) -> None:
        super().__init__()
        hidden = d_block // NUM_EXPERTS
        sizes = [dim, *[hidden] * NUM_BLOCKS, num_outputs]
        self.weights = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = fan_out**-0.5
            self.weights.append(torch.empty(NUM_EXPERTS, fan_in, fan_out).uniform_(-bound, bound))
        router_class, config = parse_router({"name": "gumbel", "eval_samples": 10 if sampled else 0})
        self.gate = router_class(dim, NUM_EXPERTS, config)
        gate = nn.Linear(dim, NUM_EXPERTS)  # GG MoE keeps PyTorch's initialisation
        self.gate.load_state_dict({**self.gate.state_dict(), **gate.state_dict()})
        self.sampled = sampled

    def train(self, mode: bool = True) -> "TableMoE":
        """The softmax gate is the Gumbel gate in evaluation mode."""
        super().train(mode)
        self.gate.train(mode and self.sampled)
        return self

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, O)."""
        gates_TE = weight_matrix(self.gate(x_TD), len(x_TD))
        h_ETF = x_TD.expand(NUM_EXPERTS, -1, -1)
        for index, weight in enumerate(self.weights):
            h_ETF = h_ETF @ weight
            if index < NUM_BLOCKS:
                h_ETF = nn.functional.dropout(h_ETF.relu(), DROPOUT, self.training)
        return torch.einsum("te,eto->to", gates_TE, h_ETF)


def make_mlp(dim: int, num_outputs: int, width: int) -> nn.Sequential:
    """The MLP that GG MoE is compared with: ``NUM_BLOCKS`` times linear, ReLU, dropout, and a linear output."""
    layers: list[nn.Module] = []
    for fan_in in (dim, *[width] * (NUM_BLOCKS - 1)):
        layers += [nn.Linear(fan_in, width), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def matching_width(dim: int, num_outputs: int, target: int) -> int:
    """Width of the largest MLP with no more than ``target`` parameters."""
    width = 1
    while num_parameters(make_mlp(dim, num_outputs, width + 1)) <= target:
        width += 1
    return width
