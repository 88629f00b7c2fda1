"""One forward of an exchange: rows out in chunks, experts, sums back; see `moe.parallel.exchange.expert_parallel`.

Legend: T tokens, D model, N assignments, E experts, C chunks, H hops, R received rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moe.experts import ExpertBank
from moe.parallel.collectives import Peers
from moe.parallel.exchange.hop import Assigned, Hop
from moe.parallel.exchange.payload import MODEL, Payload
from moe.parallel.exchange.transfer import Transfer, new_anchor
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class Road:
    """What does not depend on the batch.

    Attributes:
        stages: peers of each hop.
        num_chunks: parts of a batch that travel one after the other.
        payload: of rows.
        send_weights: False where every weight is one.
        layer: for `moe.parallel.trace`.
    """

    stages: list[Peers]
    num_chunks: int
    payload: Payload
    send_weights: bool
    layer: str


class Crossing:
    """A batch of tokens, to its experts and back."""

    def __init__(self, road: Road, x_TD: Tensor, routing: Routing) -> None:
        self._road, self._routing, self._anchor = road, routing, new_anchor(x_TD.device)
        num_tokens, num_chunks = x_TD.shape[0], road.num_chunks
        bounds = [num_tokens * chunk // num_chunks for chunk in range(num_chunks + 1)]
        self._tokens_C = [end - start for start, end in pairwise(bounds)]
        self._chunks = x_TD.split(self._tokens_C)
        self._hops: list[Hop] = []
        self._out: list[Transfer] = []
        self._back: list[Transfer] = []
        for chunk in range(num_chunks):
            what = "rows" if num_chunks == 1 else f"rows, chunk {chunk + 1} of {num_chunks}"
            self._out.append(Transfer(road.payload, x_TD.dtype, what, road.layer, outward=True))
            self._back.append(Transfer(road.payload, x_TD.dtype, what, road.layer, outward=False))
        self._weights = Transfer(MODEL, torch.float32, "weights", road.layer, outward=True)

    def run(self, experts: ExpertBank, meanwhile: Callable[[], Tensor] | None) -> Tensor:
        """Weighted sums of experts, (T, D); calls ``meanwhile`` once while rows travel.

        At step s experts compute on chunk s. Before, every later chunk moves on by one hop; after, every earlier one.
        """
        num_hops = len(self._road.stages)
        self._plan_hop(
            Assigned(
                token_ids_N=self._routing.token_ids_N,
                expert_ids_N=self._routing.expert_ids_N,
                num_experts=self._routing.num_experts,
                tokens_C=self._tokens_C,
            )
        )
        if self._road.send_weights:
            self._weights.start(self._routing.weights_N[:, None], self._anchor)
        self._move_out(-num_hops)
        if meanwhile is not None:
            meanwhile()
        routings = self._arrive()
        sums: list[Tensor] = []
        for step in range(1 - num_hops, len(routings) + num_hops):
            self._move_out(step)
            if 0 <= step < len(routings):
                y_RD = experts(self._out[step].finish(), routings[step])
                self._back[step].start(y_RD, self._anchor)
            for chunk in range(step - 1, step - num_hops, -1):
                if 0 <= chunk < len(routings):
                    self._back[chunk].advance()
            if step >= num_hops:
                sums.append(self._back[step - num_hops].finish())
        return torch.cat(sums)

    def _move_out(self, step: int) -> None:
        """Bring the chunks after ``step`` one hop further, the nearest one to its last."""
        num_hops = len(self._road.stages)
        for ahead in range(num_hops, 0, -1):
            chunk = step + ahead
            if 0 <= chunk < len(self._out):
                if ahead == num_hops:
                    self._out[chunk].start(self._chunks[chunk], self._anchor)
                else:
                    self._out[chunk].advance()

    def _plan_hop(self, assigned: Assigned, places_N: Tensor | None = None) -> None:
        """Plan the next hop; ``places_N`` says where the last one's assignments are among those that it received."""
        hop = Hop(assigned, self._road.stages[len(self._hops)], self._road.layer)
        for out, back, leg in zip(self._out, self._back, hop.legs_C, strict=True):
            out.legs.append(leg)
            back.legs.append(leg)
        leg = hop.assignments
        self._weights.legs.append(leg if places_N is None else replace(leg, rows_P=places_N[leg.rows_P]))
        self._hops.append(hop)

    def _arrive(self) -> list[Routing]:
        """Plan the hops that are left, and say what each chunk's rows are for."""
        for _ in self._road.stages[1:]:
            self._plan_hop(*self._hops[-1].arrived())
            if self._road.send_weights:
                self._weights.advance()
        assigned, places_N = self._hops[-1].arrived()
        if self._road.send_weights:
            weights_N = self._weights.finish()[:, 0][places_N]
        else:
            weights_N = torch.ones(places_N.shape, device=places_N.device)
        sizes_C = self._hops[-1].received_assignments_C
        first_row, routings = 0, []
        for num_rows, token_ids_N, expert_ids_N, weights in zip(
            assigned.tokens_C,
            assigned.token_ids_N.split(sizes_C),
            assigned.expert_ids_N.split(sizes_C),
            weights_N.split(sizes_C),
            strict=True,
        ):
            counts_E = expert_ids_N.new_zeros(assigned.num_experts)
            routings.append(
                Routing(
                    num_tokens=num_rows,
                    num_experts=assigned.num_experts,
                    token_ids_N=token_ids_N - first_row,
                    expert_ids_N=expert_ids_N.contiguous(),
                    weights_N=weights,
                    counts_E=counts_E.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N)),
                )
            )
            first_row += num_rows
        return routings
