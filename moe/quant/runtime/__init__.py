"""Runs quantised models: their weights stay packed."""

from moe.quant.runtime.linear import QuantizedLinear
from moe.quant.runtime.load import load_quantized

__all__ = ["QuantizedLinear", "load_quantized"]
