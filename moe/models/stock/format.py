"""What a checkpoint format is: a config class and names of tensors for what `MoEConfig` and `MoEWeights` say."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights


class Format(Protocol):
    """A checkpoint format; tensors outside the MoE layers have the same names in all of them."""

    @property
    def name(self) -> str:
        """Its key in `FORMATS`."""

    def refusals(self, config: MoEConfig) -> list[str]:
        """What of a model this format cannot express, one sentence per property with its value; empty where it fits."""

    def notes(self, config: MoEConfig) -> list[str]:
        """Which weights are rewritten so that the model fits, one sentence each; empty where all stay as they are."""

    def to_stock(self, config: MoEConfig) -> PreTrainedConfig:
        """The config that the format's readers need."""

    def from_stock(self, config: PreTrainedConfig) -> MoEConfig:
        """The same model as ours.

        Raises:
            ValueError: we cannot express it; names the property.
        """

    def write_layer(self, config: MoEConfig, weights: MoEWeights, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one MoE layer; ``prefix`` is ``model.layers.N.``."""

    def added(self, config: MoEConfig, dtype: torch.dtype, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that the format wants in any layer beyond those of the source, in ``dtype``."""

    def read_layer(self, config: PreTrainedConfig, folder: ModelFolder, prefix: str) -> MoEWeights:
        """One MoE layer of a folder in this format."""

    def is_moe_tensor(self, name: str) -> bool:
        """Whether a tensor of a folder in this format belongs to an MoE layer's FFN, given that the layer is one."""
