"""``carve``: perplexity and cost of carving methods on a real model; see `benchmarks.carve.benchmark`."""
