"""What is planned: a model's shape, the layout of a job, and the parameters that one rank of it owns.

Parameters are not computed by formulas: the real model is built on the meta device, its experts are sharded by the real
code, and DeepSpeed's own function splits the optimizer groups.
"""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe.layer import MoELayer, MoESpec
from moe.models import MoEConfig
from moe.parallel.exchange.config import ExchangeConfig

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model to plan for.

    Attributes:
        decoder: transformers' config of the dense decoder.
        moe: its `MoESpec`; ``None`` for the dense decoder itself.
        seq_len: L of the training sequences.
        packed: sequences hold several documents, so attention gets a mask of (B, 1, L, L) bool.
    """

    decoder: PreTrainedConfig
    moe: MoESpec | None
    seq_len: int
    packed: bool = False

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.decoder.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with experts."""
        return 0 if self.moe is None else sum(self.moe.is_moe_layer(index) for index in range(self.num_layers))

    def with_layers(self, num_dense: int, num_moe: int) -> "ModelShape":
        """The same model with fewer layers, the dense ones at the bottom."""
        decoder = copy.deepcopy(self.decoder)
        for name, value in list(vars(decoder).items()):
            if isinstance(value, list) and len(value) == self.num_layers:  # such as layer_types
                setattr(decoder, name, value[-num_moe - num_dense :])
        decoder.num_hidden_layers = num_dense + num_moe
        moe = self.moe
        if moe is not None:
            moe = (
                MoESpec.from_dict({**moe.to_dict(), "first_dense_layers": num_dense, "every": 1, "only_layers": None})
                if num_moe
                else None
            )
        return ModelShape(decoder=decoder, moe=moe, seq_len=self.seq_len, packed=self.packed)

    def build(self) -> PreTrainedModel:
        """The model on the meta device in fp32, with all experts."""
        config: PreTrainedConfig = self.decoder
        if self.moe is not None:
            config = MoEConfig(text_config=self.decoder, moe=self.moe.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.config.use_cache = False
        return model.train()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a job is spread and stepped; names and meaning are those of the run's config.

    Attributes:
        world_size: GPUs.
        ep_size, zero_stage, micro_batch_size, grad_accum: as in ``parallel`` and ``train``.
        precision: "bf16" (fp32 master weights) or "fp32".
        activation_checkpointing: recompute each layer in backward.
        gpus_per_node: GPUs that share the fast link.
        zero: DeepSpeed's ``zero_optimization`` section, where it differs from the defaults.
        exchange: how tokens travel to experts; ``hierarchical="auto"`` is two-stage where the expert group spans nodes.
    """

    world_size: int
    ep_size: int = 1
    zero_stage: int = 1
    micro_batch_size: int = 1
    grad_accum: int = 1
    precision: str = "bf16"
    activation_checkpointing: bool = False
    gpus_per_node: int = 8
    zero: dict[str, Any] = field(default_factory=dict)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)

    @property
    def node_size(self) -> int:
        """Ranks of an expert group on one node."""
        return min(self.ep_size, self.gpus_per_node)

    @property
    def resolved_exchange(self) -> ExchangeConfig:
        """``exchange`` without "auto", which a run decides by where it was started."""
        if self.exchange.hierarchical != "auto":
            return self.exchange
        spans = self.exchange.dedup and self.node_size < self.ep_size
        return dataclasses.replace(self.exchange, hierarchical=self.node_size if spans else "off", backend="torch")

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.ep_size


@dataclass(frozen=True, kw_only=True)
class OwnedParameter:
    """A parameter as one rank holds it before ZeRO."""

    name: str
    numel: int
    part: str
    is_expert: bool


@dataclass(frozen=True, kw_only=True)
class OwnedParameters:
    """All parameters of one rank.

    Attributes:
        groups: by optimizer group, in DeepSpeed's order.
        total: parameters of the whole model, every expert counted once.
    """

    groups: tuple[tuple[OwnedParameter, ...], ...]
    total: int

    @property
    def numel(self) -> int:
        """Parameters on this rank before ZeRO."""
        return sum(parameter.numel for group in self.groups for parameter in group)

    def by_part(self) -> dict[str, int]:
        """Parameters on this rank by part of the model."""
        found: Counter[str] = Counter()
        for group in self.groups:
            for parameter in group:
                found[parameter.part] += parameter.numel
        return dict(found)


def owned_parameters(model: nn.Module, optimizer_groups: list[list[str]], total: int) -> OwnedParameters:
    """Read the parameters of a model whose experts `shard_experts` has sharded.

    Args:
        model: the sharded model.
        optimizer_groups: parameter names of each group before DeepSpeed splits off the experts.
        total: parameters before sharding.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from moe.parallel.engine import is_expert_parameter

    named = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    groups: list[dict[str, Any]] = [
        {"name": str(index), "params": [named[name] for name in group]} for index, group in enumerate(optimizer_groups)
    ]
    if any(is_expert_parameter(parameter) for parameter in named.values()):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    parts = _parts(model)
    return OwnedParameters(
        groups=tuple(
            tuple(
                OwnedParameter(
                    name=names[id(p)], numel=p.numel(), part=parts[names[id(p)]], is_expert=is_expert_parameter(p)
                )
                for p in group["params"]
            )
            for group in groups
            if group["params"]
        ),
        total=total,
    )


def _parts(model: nn.Module) -> dict[str, str]:
    """The part of the model that each parameter belongs to, by name."""
    of_layers: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MoELayer):
            of_layers |= {f"{prefix}.router": "router", f"{prefix}.experts": "routed experts"}
            of_layers |= {f"{prefix}.shared_experts": "shared experts"}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embeddings.add(id(head.weight))
    found = {}
    for name, parameter in model.named_parameters():
        parts = [part for prefix, part in of_layers.items() if name.startswith(f"{prefix}.")]
        if parts:
            found[name] = parts[0]
        elif id(parameter) in embeddings:
            found[name] = "embedding"
        elif "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            found[name] = "norm"
        else:
            found[name] = "dense FFN" if ".mlp." in name else "attention"
    return found


def decoder_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """A decoder's config from plain data with ``model_type``."""
    return AutoConfig.for_model(**fields)
