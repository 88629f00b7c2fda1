"""Bytes that one GPU sends in a training step, by purpose and link.

The expert exchange is computed by `moe.parallel.exchange.volume`, which equals what is counted at its collectives. Data-
parallel collectives follow what DeepSpeed 0.19.8 issues:

- ZeRO 0: one all-reduce of the gradients per step.
- ZeRO 1: the same, and one all-gather of the updated weights. (Its "reduce-scatter" all-reduces whole buckets.)
- ZeRO 2: an all-reduce of the gradients per micro-batch, and the all-gather.
- ZeRO 3: per micro-batch a reduce-scatter of the gradients and an all-gather of the weights, and a second one for backward
  where more than ``stage3_max_live_parameters`` are gathered, so that forward's have gone.

A ring over D GPUs sends (D - 1) / D of the data per GPU for an all-gather or a reduce-scatter, twice that for an all-reduce. With
one ring per network port, a node sends its ring's data once over the network, shared by the GPUs of the group in that node.
"""

from dataclasses import dataclass

from moe.layer import MoESpec
from moe.parallel.exchange.volume import Volume, expected_bytes
from moe.scaling.memory import zero_options
from moe.scaling.shape import BYTES, DTYPES, Layout, ModelShape, OwnedParameters


@dataclass(frozen=True, kw_only=True)
class LinkBytes:
    """Bytes that a GPU sends, to GPUs of its node and to other nodes."""

    node: float = 0.0
    network: float = 0.0

    def __add__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(node=self.node + other.node, network=self.network + other.network)

    def __mul__(self, factor: float) -> "LinkBytes":
        return LinkBytes(node=self.node * factor, network=self.network * factor)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one GPU sends in an optimizer step.

    Attributes:
        exchange: of the experts, over all micro-batches.
        gradients: reductions of gradients.
        weights: all-gathers of weights.
        num_exchanges: collectives of the exchange.
        num_collectives: of gradients and weights; ZeRO 3 gathers and reduces each parameter by itself.
    """

    exchange: LinkBytes
    gradients: LinkBytes
    weights: LinkBytes
    num_exchanges: int
    num_collectives: int


def ring(size: float, replicas: int, per_node: int) -> LinkBytes:
    """An all-gather or a reduce-scatter of ``size`` bytes over ``replicas`` GPUs, of which ``per_node`` share a node."""
    sent = size * (replicas - 1) / replicas
    if per_node >= replicas:
        return LinkBytes(node=sent)
    return LinkBytes(node=sent * (1 - 1 / per_node), network=sent / per_node)


def exchange_per_layer(spec: MoESpec, dim: int, top_k: int, num_tokens: int, layout: Layout) -> Volume:
    """Expected bytes of one layer's forward and backward for one rank's tokens, under uniform routing."""
    return expected_bytes(
        num_tokens,
        top_k,
        spec.num_experts,
        layout.ep_size,
        dim,
        DTYPES[layout.precision],
        layout.resolved_exchange,
        layout.node_size,
    )


def with_recompute(volume: Volume, recompute: bool) -> LinkBytes:
    """By link; with activation checkpointing the forward half travels twice."""

    def total(kinds: dict[str, float]) -> float:
        again = sum(number for kind, number in kinds.items() if kind.startswith("forward")) if recompute else 0.0
        return sum(kinds.values()) + again

    return LinkBytes(node=total(volume.intra), network=total(volume.inter))


def plan_traffic(shape: ModelShape, layout: Layout, owned: OwnedParameters, top_k: int) -> Traffic:
    """Bytes of an optimizer step under uniform routing."""
    exchange, num_exchanges = LinkBytes(), 0
    if shape.moe is not None and layout.ep_size > 1:
        tokens = layout.micro_batch_size * shape.seq_len
        volume = exchange_per_layer(shape.moe, shape.decoder.hidden_size, top_k, tokens, layout)
        exchange = with_recompute(volume, layout.activation_checkpointing) * (shape.num_moe_layers * layout.grad_accum)
        hops = 2 if isinstance(layout.resolved_exchange.hierarchical, int) else 1
        # counts, labels, weights, rows and back; gradients of rows and weights and back
        each = 5 * hops * (2 if layout.activation_checkpointing else 1) + 4 * hops
        num_exchanges = each * shape.num_moe_layers * layout.grad_accum
    gradients, weights = LinkBytes(), LinkBytes()
    passes = _passes(layout, owned)
    for is_expert in (False, True):
        numel = sum(p.numel for group in owned.groups for p in group if p.is_expert is is_expert)
        replicas = layout.expert_replicas if is_expert else layout.world_size
        stride = layout.ep_size if is_expert else 1
        per_node = min(max(layout.gpus_per_node // stride, 1), replicas)
        once = ring(BYTES[layout.precision] * numel, replicas, per_node) if replicas > 1 else LinkBytes()
        gradients += once * passes.gradients
        weights += once * passes.weights
    num_parameters = sum(len(group) for group in owned.groups)
    return Traffic(
        exchange=exchange,
        gradients=gradients,
        weights=weights,
        num_exchanges=num_exchanges,
        num_collectives=3 * num_parameters * layout.grad_accum if layout.zero_stage == 3 else len(owned.groups),
    )


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """How often the gradients and the weights go round the ring in a step; an all-reduce goes twice."""

    gradients: int
    weights: int


def _passes(layout: Layout, owned: OwnedParameters) -> _Passes:
    micro_batches = layout.grad_accum
    gathered = sum(p.numel for group in owned.groups for p in group if not p.is_expert or layout.expert_replicas > 1)
    stays = gathered <= zero_options(layout)["stage3_max_live_parameters"]
    return {
        0: _Passes(gradients=2, weights=0),
        1: _Passes(gradients=2, weights=1),
        2: _Passes(gradients=2 * micro_batches, weights=1),
        3: _Passes(gradients=micro_batches, weights=micro_batches if stays else 2 * micro_batches),
    }[layout.zero_stage]
