"""The model that becomes a GGUF file, whatever folder it comes from: ours, a stock MoE, or a dense decoder."""

from typing import Any

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.models.stock import FORMATS
from moe.models.stock.decoder import head_dim


class GGUFSource:
    """A folder read as a decoder config with an MoE in some layers.

    Args:
        folder: the tensors.

    Attributes:
        config: of the model as ours; ``None`` for a dense one.
        decoder: config of the decoder around the experts; of a dense model, the model's own.

    Raises:
        ValueError: the config cannot be read, or we cannot express its model.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        stock = self.folder.config
        self._format = FORMATS.get("moe" if isinstance(stock, MoEConfig) else stock.model_type)
        self.config = None if self._format is None else self._format.from_stock(stock)
        # Each architecture has fields of its own.
        self.decoder: Any = stock if self.config is None else self.config.text_config

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return head_dim(self.decoder)

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return getattr(self.decoder, "num_key_value_heads", None) or self.decoder.num_attention_heads

    @property
    def rope_type(self) -> str:
        """Kind of rotary embedding."""
        return self.decoder.rope_parameters.get("rope_type", "default")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has experts."""
        return self.config is not None and self.config.spec.is_moe_layer(layer)

    def is_expert_tensor(self, layer: int, name: str) -> bool:
        """Whether a tensor of that layer is part of its MoE, and so comes with `moe_weights`."""
        return self._format is not None and self.is_moe_layer(layer) and self._format.is_moe_tensor(name)

    def moe_weights(self, layer: int) -> MoEWeights:
        """The MoE of a decoder layer."""
        assert self._format is not None
        return self._format.read_layer(self.folder.config, self.folder, f"model.layers.{layer}.")
