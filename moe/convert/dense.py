"""Where dense decoders keep their FFNs. Another architecture is one entry of `DENSE_FFNS`.

Legend: D model, F FFN width.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from moe.models.folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class FFNNames:
    """Names of a decoder layer's FFN projections below ``model.layers.N.``; ``gate`` is None for an FFN without one.

    Attributes:
        up, down, gate: names of the linear layers, without ``.weight``.
        activation_field: the config's field with the activation.
    """

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    activation_field: str = "hidden_act"


DENSE_FFNS: dict[str, FFNNames] = {
    "llama": FFNNames(),
    "mistral": FFNNames(),
    "qwen2": FFNNames(),
    "qwen3": FFNNames(),
}
# Activations of the config that `moe.activation` computes: of the gate where there is one, else of the up-projection.
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
PLAIN_ACTIVATIONS = {"gelu": "gelu"}


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """Weights of one dense FFN.

    Attributes:
        gate_FD: (F, D), or ``None`` without a gate.
        up_FD: (F, D).
        down_DF: (D, F).
    """

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor

    @property
    def width(self) -> int:
        """F."""
        return self.up_FD.shape[0]


def ffn_names(config: PreTrainedConfig) -> FFNNames:
    """Names for a dense decoder's config.

    Raises:
        ValueError: the architecture is not known here; says how to add it.
    """
    names = DENSE_FFNS.get(config.model_type)
    if names is None:
        raise ValueError(
            f"model_type={config.model_type!r} is no dense decoder known here ({', '.join(DENSE_FFNS)}); if its FFNs are "
            "model.layers.N.mlp with named projections and no bias, add a line to DENSE_FFNS in moe/convert/dense.py"
        )
    return names


def activation(config: PreTrainedConfig) -> str:
    """`MoESpec.activation` of a dense decoder's FFN.

    Raises:
        ValueError: experts cannot compute it.
    """
    names = ffn_names(config)
    known = PLAIN_ACTIVATIONS if names.gate is None else GATED_ACTIVATIONS
    found = getattr(config, names.activation_field)
    if found not in known:
        raise ValueError(
            f"{names.activation_field}={found!r} of model_type={config.model_type!r}; experts compute {known}"
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias=true of model_type={config.model_type!r}; experts have no bias")
    return known[found]


def read_ffn(folder: ModelFolder, layer: int) -> DenseFFN:
    """The FFN of decoder layer ``layer``."""
    names = ffn_names(folder.config)
    prefix = f"model.layers.{layer}."
    return DenseFFN(
        gate_FD=None if names.gate is None else folder.read(f"{prefix}{names.gate}.weight"),
        up_FD=folder.read(f"{prefix}{names.up}.weight"),
        down_DF=folder.read(f"{prefix}{names.down}.weight"),
    )


def ffn_tensors(config: PreTrainedConfig, layer: int) -> list[str]:
    """Names of the tensors that a conversion replaces."""
    names = ffn_names(config)
    return [f"model.layers.{layer}.{name}.weight" for name in (names.gate, names.up, names.down) if name is not None]
