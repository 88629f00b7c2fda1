"""Predicted time of a training step: a roofline per part, with the efficiencies of `hardware.py`. A prediction, no measurement.

Matmuls take FLOPs / (peak * efficiency), everything elementwise takes bytes / (memory bandwidth * efficiency), collectives take
bytes / (link rate * efficiency) on each link, one after the other, and a latency each. Experts are taken as evenly loaded
unless an imbalance is given: the slowest rank of an expert group decides. Kernel launches, data loading and stragglers are free.
"""

from dataclasses import dataclass

from moe.scaling.hardware import Hardware
from moe.scaling.memory import EngineBytes
from moe.scaling.shape import Layout, ModelShape
from moe.scaling.traffic import LinkBytes, Traffic


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """What a token costs.

    Attributes:
        dense: weights that every token is multiplied with (attention, dense FFNs, routers, shared experts, head).
        head: the output head's part of ``dense``, which is not recomputed.
        expert: weights of the routed experts that a token is sent to, over all layers.
        attention: FLOPs of a token's two attention products in forward, as causal kernels execute them (half the square).
        total: FLOPs of forward and backward as MFU counts them (PaLM, arXiv 2204.02311, appendix B): 6 N + 12 L H S.
    """

    dense: float
    head: float
    expert: float
    attention: float
    total: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of an optimizer step, by part, and what follows.

    Attributes:
        dense, experts, attention, elementwise: computation.
        exchange, data_parallel: communication that is not hidden.
        optimizer: of the update.
        mfu: share of the peak that the model's FLOPs are.
        tokens_per_second: of one GPU.
    """

    dense: float
    experts: float
    attention: float
    elementwise: float
    exchange: float
    data_parallel: float
    optimizer: float
    mfu: float
    tokens_per_second: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return (
            self.dense
            + self.experts
            + self.attention
            + self.elementwise
            + self.exchange
            + self.data_parallel
            + self.optimizer
        )


def link_seconds(sent: LinkBytes, hardware: Hardware) -> float:
    """Time to send over both links, one after the other."""
    node = sent.node / (hardware.node_bandwidth * hardware.link_efficiency)
    return node + sent.network / (hardware.network_bandwidth * hardware.link_efficiency)


def predict(
    shape: ModelShape,
    layout: Layout,
    flops: ModelFlops,
    kept: int,
    engine: EngineBytes,
    traffic: Traffic,
    hardware: Hardware,
    imbalance: float = 1.0,
) -> StepTime:
    """Predict a step.

    Args:
        shape, layout: what runs, and how.
        flops: of a token.
        kept: bytes that a micro-batch's forward keeps where nothing is recomputed; stands for its elementwise work.
        engine: what DeepSpeed holds.
        traffic: of a step.
        hardware: rates and assumptions.
        imbalance: rows of the fullest rank over the mean; stretches the experts' and the exchange's time.
    """
    tokens = layout.micro_batch_size * shape.seq_len * layout.grad_accum
    again = 1 if layout.activation_checkpointing else 0
    passes = 6 + 2 * again
    dense = tokens * (passes * flops.dense - 2 * again * flops.head)
    matmul, expert = hardware.flops * hardware.matmul_efficiency, hardware.flops * hardware.expert_efficiency
    memory = hardware.memory_bandwidth * hardware.memory_efficiency
    gradients, weights = link_seconds(traffic.gradients, hardware), link_seconds(traffic.weights, hardware)
    if layout.zero_stage >= 2:  # these run during backward
        gradients *= 1 - hardware.gradient_overlap
    if layout.zero_stage == 3:
        weights *= 1 - hardware.gradient_overlap
    exchange = link_seconds(traffic.exchange, hardware) * imbalance + traffic.num_exchanges * hardware.latency
    # What forward keeps is written once and read in backward once, and its gradient is as large, written and read.
    touched = (4 + 2 * again) * kept * layout.grad_accum
    parts = {
        "dense": dense / matmul,
        "experts": tokens * passes * flops.expert * imbalance / expert,
        "attention": tokens * flops.attention * (3.5 + again) / (hardware.flops * hardware.attention_efficiency),
        "elementwise": touched / memory,
        "exchange": exchange * (1 - hardware.exchange_overlap),
        "data_parallel": gradients + weights + traffic.num_collectives * hardware.latency,
        # masters and moments are read and written, gradients read
        "optimizer": (2 * engine.optimizer + engine.optimizer / 3) / memory,
    }
    total = sum(parts.values())
    speed = tokens / total
    return StepTime(**parts, mfu=speed * flops.total / hardware.flops, tokens_per_second=speed)
