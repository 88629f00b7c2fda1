"""Our own format: the state of `MoEForCausalLM` under its own names."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights


class OurFormat:
    """`MoEConfig` and `MoEForCausalLM` as they are."""

    name = "moe"

    def refusals(self, config: MoEConfig) -> list[str]:
        """Nothing."""
        return []

    def notes(self, config: MoEConfig) -> list[str]:
        """Nothing."""
        return []

    def to_stock(self, config: MoEConfig) -> PreTrainedConfig:
        """A copy of the config."""
        made = copy.deepcopy(config)
        made.architectures = ["MoEForCausalLM"]
        return made

    def from_stock(self, config: PreTrainedConfig) -> MoEConfig:
        """The config itself."""
        assert isinstance(config, MoEConfig)
        return config

    def write_layer(self, config: MoEConfig, weights: MoEWeights, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Stacked experts."""
        return weights.named(f"{prefix}mlp.")

    def added(self, config: MoEConfig, dtype: torch.dtype, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def read_layer(self, config: PreTrainedConfig, folder: ModelFolder, prefix: str) -> MoEWeights:
        """Stacked experts."""
        return MoEWeights.read(folder, f"{prefix}mlp.")

    def is_moe_tensor(self, name: str) -> bool:
        """What is below ``mlp``."""
        return ".mlp." in name


OURS = OurFormat()
