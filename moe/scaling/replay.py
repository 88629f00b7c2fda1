"""What a routing trace would cost at each expert-parallel degree: load imbalance, bytes and time of the exchange.

Each rank of an expert group gets a part of the trace's tokens, in order and starting over at the end, and the real exchange's
own byte count is applied to them.

Legend: T tokens of a rank, K top-k, W ranks of an expert group, Y MoE layers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe.parallel.exchange.volume import Volume, exchange_bytes
from moe.scaling.hardware import Hardware
from moe.scaling.shape import DTYPES, Layout
from moe.scaling.timing import link_seconds
from moe.scaling.trace import RoutingTrace
from moe.scaling.traffic import LinkBytes, with_recompute
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A trace at one expert-parallel degree; means over the trace's MoE layers.

    Attributes:
        trace: its name.
        ep_size: W.
        imbalance: assignments of the fullest rank over the mean.
        worst_imbalance: the same of the worst layer.
        rows_per_token: rows that a token sends to other ranks, at most K.
        sent: bytes that a rank sends per layer and micro-batch, forward and backward.
        plain: the same if every assignment had a row of its own.
        seconds: predicted time of the exchange per layer and micro-batch, on the busiest rank.
    """

    trace: str
    ep_size: int
    imbalance: float
    worst_imbalance: float
    rows_per_token: float
    sent: LinkBytes
    plain: LinkBytes
    seconds: float


def replay(trace: RoutingTrace, layout: Layout, dim: int, num_tokens: int, hardware: Hardware) -> Replay:
    """Replay a trace.

    Args:
        trace: the choices.
        layout: of the job; its ``ep_size`` and exchange.
        dim: D of the rows.
        num_tokens: T of each rank's micro-batch.
        hardware: links.

    Raises:
        ValueError: the degree does not divide the trace's experts.
    """
    ranks = layout.ep_size
    if trace.num_experts % ranks:
        raise ValueError(f"parallel.ep_size={ranks} does not divide the {trace.num_experts} experts of {trace.name}")
    pool_YPK = trace.expert_ids_SYTK.transpose(0, 1).flatten(1, 2).long()
    found = [_layer(pool_PK, layout, dim, num_tokens, trace.num_experts) for pool_PK in pool_YPK]
    sent, plain = (_mean([getattr(layer, name) for layer in found]) for name in ("sent", "plain"))
    return Replay(
        trace=trace.name,
        ep_size=ranks,
        imbalance=sum(layer.imbalance for layer in found) / len(found),
        worst_imbalance=max(layer.imbalance for layer in found),
        rows_per_token=sum(layer.rows_per_token for layer in found) / len(found),
        sent=sent,
        plain=plain,
        seconds=sum(link_seconds(layer.sent, hardware) * layer.busiest for layer in found) / len(found),
    )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    imbalance: float
    busiest: float  # rows that the busiest rank sends and receives, over the mean
    rows_per_token: float
    sent: LinkBytes
    plain: LinkBytes


def _layer(pool_PK: Tensor, layout: Layout, dim: int, num_tokens: int, num_experts: int) -> _Layer:
    ranks, top_k = layout.ep_size, pool_PK.shape[1]
    config = layout.resolved_exchange
    assigned_WW = torch.zeros(ranks, ranks)
    rows_WW = torch.zeros(ranks, ranks)
    sent: list[LinkBytes] = []
    plain: list[LinkBytes] = []
    for rank in range(ranks):
        ids_TK = pool_PK[(torch.arange(num_tokens) + rank * num_tokens) % len(pool_PK)]
        places_TK = ids_TK // (num_experts // ranks)
        assigned_WW[rank] = torch.bincount(places_TK.flatten(), minlength=ranks)
        rows_WW[rank] = torch.zeros(num_tokens, ranks).scatter_(1, places_TK, 1.0).sum(0)
        routing = Routing(
            num_tokens=num_tokens,
            num_experts=num_experts,
            token_ids_N=torch.arange(num_tokens).repeat_interleave(top_k),
            expert_ids_N=ids_TK.flatten(),
            weights_N=torch.empty(0),
            counts_E=torch.empty(0),
        )
        for volumes, used in ((sent, config), (plain, replace(config, dedup=False, hierarchical="off"))):
            volume: Volume = exchange_bytes(routing, rank, ranks, dim, DTYPES[layout.precision], used, layout.node_size)
            volumes.append(with_recompute(volume, layout.activation_checkpointing))
    away_WW = rows_WW.clone().fill_diagonal_(0)
    traffic_W = away_WW.sum(0) + away_WW.sum(1)
    load_W = assigned_WW.sum(0)
    return _Layer(
        imbalance=float(load_W.max() / load_W.mean()),
        busiest=float(traffic_W.max() / traffic_W.mean()) if ranks > 1 else 1.0,
        rows_per_token=float(away_WW.sum() / (ranks * num_tokens)),
        sent=_mean(sent),
        plain=_mean(plain),
    )


def _mean(sizes: list[LinkBytes]) -> LinkBytes:
    total = LinkBytes()
    for size in sizes:
        total += size
    return total * (1 / len(sizes))
