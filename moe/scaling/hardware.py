"""GPUs and links as their data sheets give them, and how much of that is assumed to be reached. Every prediction rests on this.

Peaks are dense (not sparse) bf16, of SXM boards, from NVIDIA's data sheets: A100 (312 TFLOPS, 80 GB at 2.0 TB/s, NVLink
600 GB/s), H100 (989.5 TFLOPS, 80 GB at 3.35 TB/s, NVLink 900 GB/s), H200 (as H100, 141 GB at 4.8 TB/s), B200 in a DGX B200
(2250 TFLOPS, 180 GB at 8 TB/s, NVLink 1800 GB/s). NVLink figures are both directions together, so half counts for sending. The
network is one InfiniBand port per GPU as in NVIDIA's DGX systems: 200 Gb/s for A100, 400 Gb/s for the others.

Efficiencies are assumptions, not measurements of this project, and can all be changed on the command line.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and its links; rates per GPU and second, in one direction.

    Attributes:
        flops: dense bf16 peak.
        memory_bytes: of one GPU.
        memory_bandwidth: bytes per second of its memory.
        node_bandwidth: bytes per second to GPUs of the same node.
        network_bandwidth: bytes per second to other nodes.
        matmul_efficiency: share of ``flops`` that dense matmuls reach.
        expert_efficiency: the same of the experts' grouped matmuls.
        attention_efficiency: the same of attention's two products.
        link_efficiency: share of both link rates that collectives reach.
        memory_efficiency: share of ``memory_bandwidth`` that elementwise work and the optimizer reach.
        exchange_overlap: share of the exchange's time that hides behind computation.
        gradient_overlap: the same of the data-parallel collectives, where the ZeRO stage runs them during backward.
        latency: seconds of a collective that sends nothing.
        reserved_bytes: of ``memory_bytes`` for the CUDA context, libraries and fragmentation.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    matmul_efficiency: float = 0.65
    expert_efficiency: float = 0.45
    attention_efficiency: float = 0.45
    link_efficiency: float = 0.7
    memory_efficiency: float = 0.75
    exchange_overlap: float = 0.0
    gradient_overlap: float = 0.5
    latency: float = 20e-6
    reserved_bytes: float = 3e9


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="a100", flops=312e12, memory_bytes=80e9, memory_bandwidth=2.0e12, node_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Hardware(
            name="h100", flops=989.5e12, memory_bytes=80e9, memory_bandwidth=3.35e12, node_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Hardware(
            name="h200", flops=989.5e12, memory_bytes=141e9, memory_bandwidth=4.8e12, node_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Hardware(
            name="b200", flops=2250e12, memory_bytes=180e9, memory_bandwidth=8.0e12, node_bandwidth=900e9,
            network_bandwidth=50e9,
        ),
        # for comparison with runs that can be made anywhere: one core with AVX-512, ranks that talk through memory
        Hardware(
            name="cpu", flops=1e11, memory_bytes=8e9, memory_bandwidth=1e10, node_bandwidth=2e9, network_bandwidth=1e9,
            reserved_bytes=5e8,
        ),
    )
}  # fmt: skip
