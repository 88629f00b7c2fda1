"""`MoEConfig`: a dense Hugging Face decoder config plus what turns its FFNs into experts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from moe.layer import MoESpec


@strict
class MoEConfig(PreTrainedConfig):
    """Configuration of `MoEForCausalLM`.

    Attributes:
        text_config: the dense decoder (a config, or its dict with ``model_type``), whose FFN width is that of dense layers.
        moe: an `MoESpec` as plain data; checked here, so that a wrong key fails when the config is made.
        mup: widths of the base model of the muP parametrization (`moe.scaling.mup`); ``None`` for the standard one.
        tie_word_embeddings: taken from ``text_config``.
    """

    model_type = "moe_decoder"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    moe: dict | None = None
    mup: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.moe = MoESpec.from_dict(self.moe or {}).to_dict()
        assert isinstance(self.text_config, PreTrainedConfig)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @property
    def spec(self) -> MoESpec:
        """The MoE part as a checked dataclass."""
        return MoESpec.from_dict(self.moe or {})
