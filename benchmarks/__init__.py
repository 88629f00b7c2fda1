"""Benchmarks: each is one entry of `benchmarks.registry.BENCHMARKS`; `benchmarks/run.py` runs them. Not installed."""
