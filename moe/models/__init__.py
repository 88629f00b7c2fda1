"""The Hugging Face side: importing this package registers ``moe_decoder`` with transformers' Auto classes."""

from moe.models.config import MoEConfig
from moe.models.modeling import MoEForCausalLM, register

register()

__all__ = ["MoEConfig", "MoEForCausalLM"]
