"""Expert parallelism: tokens travel to the ranks that hold their experts, and sums of their results come back.

Each token is sent once to each destination rank, with the list of its experts there and their weights; the destination
runs the ordinary `expert_ffn` on what arrived, which already sums a token's local experts, and returns that sum. At K
experts per token this moves one row where a plain exchange moves one per assignment. Weights travel with autograd, so the
router's gradient is exact.

In two stages ("hierarchical") a token first goes once to each *node* that has some of its experts, to the rank there with
the sender's place in its own node, which passes it on within the node; sums take the same way back and are added up
before they leave the node.

A batch may travel in chunks: while experts compute on one, the next is on its way there and the last on its way back. The
order in which a rank issues collectives depends on the options alone, never on its tokens, so ranks without tokens,
without assignments or without received rows take part in all of them.

Legend: T tokens, D model, N assignments, E experts, e local experts, W ranks, C chunks, R received rows.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe.experts import ExpertBank
from moe.parallel.collectives import Group
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.crossing import Crossing, Road
from moe.parallel.exchange.payload import PAYLOADS
from moe.parallel.exchange.stages import stages_of
from moe.types import Routing


class ExpertParallelExchange:
    """Runs a layer's experts where they live; the `moe.layer.Exchange` of an expert-parallel model.

    Args:
        group: the expert-parallel process group. Rank r of it holds experts [r * e, (r + 1) * e).
        rank, num_ranks: this process's place in it.
        config: options; the same on all ranks.
        layer: the layer's name, for `moe.parallel.trace`.
    """

    def __init__(
        self, group: Group, rank: int, num_ranks: int, config: ExchangeConfig | None = None, layer: str = ""
    ) -> None:
        self.config = config or ExchangeConfig()
        self._road = Road(
            stages=stages_of(group, rank, num_ranks, self.config),
            num_chunks=self.config.overlap_chunks,
            payload=PAYLOADS[self.config.payload],
            send_weights=self.config.dedup,
            layer=layer,
        )

    @torch.compiler.disable
    def __call__(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: ExpertBank,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Weighted sum of each token's experts wherever they live: (T, D) -> (T, D).

        ``meanwhile`` is called once while rows travel; its result is the caller's business.
        """
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))  # the experts would, and it halves the way
        if self.config.dedup:
            return Crossing(self._road, x_TD, routing).run(experts, meanwhile)
        # One row per assignment, each a token with one expert; weights are applied to what comes back.
        num_rows = routing.token_ids_N.shape[0]
        each = replace(routing, num_tokens=num_rows, token_ids_N=torch.arange(num_rows, device=x_TD.device))
        y_ND = Crossing(self._road, x_TD[routing.token_ids_N], each).run(experts, meanwhile)
        weighted_ND = y_ND * routing.weights_N[:, None]
        y_TD = torch.zeros(x_TD.shape, device=x_TD.device, dtype=weighted_ND.dtype)
        return y_TD.index_add(0, routing.token_ids_N, weighted_ND).to(y_ND.dtype)
