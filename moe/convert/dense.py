"""Where dense decoders keep their FFNs. Another architecture is one entry of `DENSE_FFNS`.

Legend: D model, F FFN width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class FFNNames:
    """Names of a decoder layer's FFN projections below ``model.layers.N.``.

    Attributes:
        up, down, gate: names of the linear layers, without ``.weight``; ``gate`` is None for an FFN without one.
        fused: ``up`` holds the gate's rows first, then the up-projection's; ``gate`` is None then.
        activation_field: the config's field with the activation.
        bias_field: the config's field that gives the projections biases, which experts do not have.
    """

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    fused: bool = False
    activation_field: str = "hidden_act"
    bias_field: str = "mlp_bias"

    @property
    def is_gated(self) -> bool:
        """Whether the up-projection is multiplied by an activated gate."""
        return self.fused or self.gate is not None


_GATED = FFNNames()
_FUSED = FFNNames(up="mlp.gate_up_proj", gate=None, fused=True)
_PLAIN = FFNNames(gate=None)

DENSE_FFNS: dict[str, FFNNames] = {
    "llama": _GATED,
    "mistral": _GATED,
    "ministral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "smollm3": _GATED,
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmo3": _GATED,
    "seed_oss": _GATED,
    "exaone4": _GATED,
    "helium": _GATED,
    "granite": _GATED,
    "stablelm": _GATED,
    "ernie4_5": FFNNames(bias_field="use_bias"),
    "glm": _FUSED,
    "glm4": _FUSED,
    "phi3": _FUSED,
    "arcee": _PLAIN,
    "nemotron": _PLAIN,
    "starcoder2": FFNNames(up="mlp.c_fc", down="mlp.c_proj", gate=None, bias_field="use_bias"),
}
# Activations of the config that experts compute: of the gate where there is one, else of the up-projection.
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
PLAIN_ACTIVATIONS = {"gelu": "gelu"}  # the exact one; "gelu_pytorch_tanh" and "gelu_new" differ from it by up to 5e-4
# Config fields by which Mixture-of-Experts architectures say how many experts they have.
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


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
    if names is not None:
        return names
    if isinstance(config, MoEConfig) or any(getattr(config, field, None) for field in _EXPERT_FIELDS):
        raise ValueError(f"model_type={config.model_type!r} is a Mixture-of-Experts already; give a dense decoder")
    raise ValueError(
        f"model_type={config.model_type!r} is no dense decoder known here ({', '.join(DENSE_FFNS)}); if its FFNs are "
        "model.layers.N.mlp with named projections and no bias, add a line to DENSE_FFNS in moe/convert/dense.py"
    )


def activation(config: PreTrainedConfig) -> str:
    """`MoESpec.activation` of a dense decoder's FFN.

    Raises:
        ValueError: experts cannot compute it.
    """
    names = ffn_names(config)
    known = GATED_ACTIVATIONS if names.is_gated else PLAIN_ACTIVATIONS
    found = getattr(config, names.activation_field)
    if found not in known:
        raise ValueError(
            f"{names.activation_field}={found!r} of model_type={config.model_type!r} is not what experts compute; "
            f"{'with' if names.is_gated else 'without'} a gate that is {' or '.join(known)}"
        )
    if getattr(config, names.bias_field, False):
        raise ValueError(f"{names.bias_field}=true of model_type={config.model_type!r}; experts have no bias")
    return known[found]


def read_ffn(folder: ModelFolder, layer: int) -> DenseFFN:
    """The FFN of decoder layer ``layer``."""
    names = ffn_names(folder.config)
    prefix = f"model.layers.{layer}."
    gate_FD = None if names.gate is None else folder.read(f"{prefix}{names.gate}.weight")
    up_FD = folder.read(f"{prefix}{names.up}.weight")
    if names.fused:
        gate_FD, up_FD = up_FD.chunk(2)
    return DenseFFN(gate_FD=gate_FD, up_FD=up_FD, down_DF=folder.read(f"{prefix}{names.down}.weight"))


def ffn_tensors(config: PreTrainedConfig, layer: int) -> list[str]:
    """Names of the tensors that a conversion replaces."""
    names = ffn_names(config)
    return [f"model.layers.{layer}.{name}.weight" for name in (names.gate, names.up, names.down) if name is not None]


def check_dense(folder: ModelFolder, layers: Iterable[int]) -> None:
    """Check that experts can take the place of the FFNs of ``layers``, without reading weights.

    Raises:
        ValueError: architecture, activation, a bias, quantised weights, or a tensor that is missing or of another shape.
    """
    config = folder.config
    activation(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder.path} has quantised weights; give the model in fp32, bf16 or fp16")
    names = ffn_names(config)
    width, dim = config.intermediate_size, config.hidden_size
    height = 2 * width if names.fused else width
    for layer in layers:
        expected = dict.fromkeys(ffn_tensors(config, layer), (height, dim))
        expected[f"model.layers.{layer}.{names.down}.weight"] = (dim, width)
        for name, shape in expected.items():
            if (found := folder.shape(name)) != shape:
                raise ValueError(f"{folder.path}: {name} has shape {found}, and config.json means {shape}")
        prefix = f"model.layers.{layer}.{names.down.split('.')[0]}."
        if extra := sorted(name for name in folder.names if name.startswith(prefix) and name not in expected):
            raise ValueError(f"{folder.path}: {extra[0]} has no place in an expert")
