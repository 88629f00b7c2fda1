"""``quantize``: quality, ablations and exports of quantised MoE models; see `benchmarks.quantize.benchmark`."""
