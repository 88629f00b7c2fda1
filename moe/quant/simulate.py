"""Quantised activations in ordinary floating-point modules: what a server's integer kernels compute, apart from the order of sums.

Inputs of all quantised matrices are rounded per token when they come, those of experts' down-projections after the activation.
Weights are put in dequantised by whoever made them.

Legend: T tokens, D model, F expert FFN, r rows of one expert.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe.experts import ExpertBank
from moe.kernels.grouped import sort_by_expert
from moe.kernels.reference import activate
from moe.quant.grids import Grid
from moe.quant.layer import banks, linears
from moe.types import Routing


class SimulatedBank(ExpertBank):
    """An `ExpertBank` whose two products see rounded rows; for inference.

    Args:
        bank: its parameters are taken over.
        grid: of the rows.
    """

    def __init__(self, bank: ExpertBank, grid: Grid) -> None:
        nn.Module.__init__(self)
        self.activation, self.options, self.grid = bank.activation, bank.options, grid
        self.gate_up_proj, self.down_proj = bank.gate_up_proj, bank.down_proj

    @torch.no_grad()
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See `ExpertBank.forward`."""
        order, x_TD = sort_by_expert(routing), self.grid.simulate(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for expert, start, stop in order.blocks:
            token_ids_r = order.token_ids_N[start:stop]
            a_rF = activate(x_TD[token_ids_r] @ self.gate_up_proj[expert].T, self.activation)
            weights_r1 = routing.weights_N[order.order_N[start:stop], None].to(x_TD.dtype)
            y_TD.index_add_(0, token_ids_r, self.grid.simulate(a_rF) @ self.down_proj[expert].T * weights_r1)
        return y_TD


def quantize_activations(module: nn.Module, grid: Grid | None) -> None:
    """Let the quantised matrices below ``module`` see rounded rows from now on; nothing where ``grid`` is ``None``."""
    if grid is None:
        return

    def round_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (grid.simulate(args[0]), *args[1:])

    for linear in linears(module).values():
        linear.register_forward_pre_hook(round_input)
    for name, bank in banks(module).items():
        assert not isinstance(bank, SimulatedBank), "its activations are rounded already"
        module.set_submodule(name, SimulatedBank(bank, grid))
