"""The method ``best``: what a neuron is worth, who runs together, and a linear gate, each fitted to what the output loses."""

from moe.convert.carve.best.best import carve_best

__all__ = ["carve_best"]
