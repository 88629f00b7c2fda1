"""The method ``best``: experts, a linear gate and a refit, each fitted to what is lost of the output."""

from moe.convert.carve.best.best import carve_best

__all__ = ["carve_best"]
