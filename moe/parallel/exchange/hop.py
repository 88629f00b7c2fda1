"""One stage of an exchange: who sends which rows to whom, and what arrives.

A hop sees tokens and their assignments to experts, which its peers hold in equal parts, in order. Each token goes once to
every peer with one of its experts; what arrives are tokens with assignments to fewer experts, the input of a further hop or
of the experts. A hop's tokens come in chunks that travel one by one; counts and assignments travel for all at once.

An assignment is an int32 on the wire: its expert, and whether it is the first of its token.

Legend: T tokens, N assignments, W peers, C chunks, P (token, peer) pairs, R received rows.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moe.parallel.collectives import Label, Peers, PendingRows, start_all_to_all, start_counts


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """Tokens, chunk by chunk, with assignments to experts.

    Attributes:
        token_ids_N: int64; counted over all chunks.
        expert_ids_N: int64, below ``num_experts``.
        num_experts: those that the peers of the next hop hold together.
        tokens_C: number of tokens of each chunk.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    num_experts: int
    tokens_C: list[int]


@dataclass(frozen=True, kw_only=True)
class Leg:
    """How one tensor's rows pass a hop.

    Attributes:
        rows_P: int64, the sender's row of each travelling one, by peer.
        num_rows: rows that the sender has.
        send_W, receive_W: travelling rows to and from each peer.
        peers: who takes part.
    """

    rows_P: Tensor
    num_rows: int
    send_W: list[int]
    receive_W: list[int]
    peers: Peers


class Hop:
    """A planned hop.

    Attributes:
        legs_C: of each chunk's rows.
        assignments: leg of one number per assignment of all chunks, as they are listed in `Assigned`.
    """

    def __init__(self, assigned: Assigned, peers: Peers, layer: str) -> None:
        """Plan with the peers; collective. Labels are on their way afterwards, see `arrived`."""
        num_tokens, num_peers = sum(assigned.tokens_C), len(peers)
        self._num_local = assigned.num_experts // num_peers
        self._num_chunks = len(assigned.tokens_C)
        peers_N = assigned.expert_ids_N // self._num_local
        pending = start_counts(
            _counts(assigned, peers_N, num_peers), peers, Label(name="forward dispatch counts", layer=layer)
        )
        # while they travel
        keys_N, order_N = (peers_N * num_tokens + assigned.token_ids_N).sort(stable=True)
        first_N = torch.ones_like(keys_N)
        first_N[1:] = keys_N[1:] != keys_N[:-1]
        labels_N = ((assigned.expert_ids_N % self._num_local)[order_N] * 2 + first_N).int()
        pair_N, tokens_N = first_N.cumsum(0) - 1, assigned.token_ids_N[order_N]

        counts = pending.wait()
        sent_WC2, self._received_WC2 = counts.sent, counts.received
        pairs_WC = [[pairs for pairs, _ in chunks] for chunks in sent_WC2]
        tokens_P = tokens_N.new_empty(sum(map(sum, pairs_WC))).scatter_(0, pair_N, tokens_N)
        self.legs_C = self._legs(tokens_P, pairs_WC, assigned.tokens_C, peers)
        self.assignments = Leg(
            rows_P=order_N,
            num_rows=len(order_N),
            send_W=[sum(number for _, number in chunks) for chunks in sent_WC2],
            receive_W=[sum(number for _, number in chunks) for chunks in self._received_WC2],
            peers=peers,
        )
        self._labels: PendingRows = start_all_to_all(
            labels_N[:, None],
            self.assignments.send_W,
            self.assignments.receive_W,
            peers,
            Label(name="forward dispatch labels", layer=layer),
        )

    def _legs(self, tokens_P: Tensor, pairs_WC: list[list[int]], tokens_C: list[int], peers: Peers) -> list[Leg]:
        segments = tokens_P.split([pairs for chunks in pairs_WC for pairs in chunks])
        first_token_C = [0, *accumulate(tokens_C)]
        return [
            Leg(
                rows_P=torch.cat(segments[chunk :: self._num_chunks]) - first_token_C[chunk],
                num_rows=tokens_C[chunk],
                send_W=[chunks[chunk] for chunks in pairs_WC],
                receive_W=[chunks[chunk][0] for chunks in self._received_WC2],
                peers=peers,
            )
            for chunk in range(self._num_chunks)
        ]

    def arrived(self) -> tuple[Assigned, Tensor]:
        """What this rank holds after the hop; once, waits for the labels.

        Returns:
            The received tokens, and (N,) int64: where each of their assignments is among the received ones.
        """
        labels_N = self._labels.wait()[:, 0].long()
        # by chunk, then peer: they came by peer, then chunk
        segments = torch.arange(len(labels_N), device=labels_N.device).split(
            [number for chunks in self._received_WC2 for _, number in chunks]
        )
        places_N = torch.cat(
            [part for chunk in range(self._num_chunks) for part in segments[chunk :: self._num_chunks]]
        )
        labels_N = labels_N[places_N]
        assigned = Assigned(
            token_ids_N=(labels_N & 1).cumsum(0) - 1,
            expert_ids_N=labels_N >> 1,
            num_experts=self._num_local,
            tokens_C=[sum(leg.receive_W) for leg in self.legs_C],
        )
        return assigned, places_N

    @property
    def received_assignments_C(self) -> list[int]:
        """Assignments of each chunk that arrived."""
        return [sum(chunks[chunk][1] for chunks in self._received_WC2) for chunk in range(self._num_chunks)]


def _counts(assigned: Assigned, peers_N: Tensor, num_peers: int) -> Tensor:
    """(W, C, 2) int64: pairs and assignments for each peer in each chunk; nothing here waits for a device."""
    num_tokens = sum(assigned.tokens_C)
    table_TW = torch.zeros(num_tokens * num_peers, dtype=torch.int64, device=peers_N.device)
    table_TW.scatter_add_(0, assigned.token_ids_N * num_peers + peers_N, torch.ones_like(peers_N))
    chunks = table_TW.view(num_tokens, num_peers).split(assigned.tokens_C)
    return torch.stack([torch.stack([(chunk > 0).sum(0), chunk.sum(0)], dim=-1) for chunk in chunks], dim=1)
