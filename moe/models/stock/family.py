"""What stock architectures have in common: two-dimensional tensors per expert, whatever their names.

Legend: D model, F expert FFN, E routed experts, S shared experts' FFN width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights
from moe.models.stock.decoder import common_fields, decoder_config, head_dim
from moe.models.stock.fit import Gate, Limits, gate_of, refusals


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names below ``model.layers.N.``, without ``.weight``.

    Attributes:
        block: of the MoE FFN.
        gate, up, down: of an expert's projections.
        shared, shared_gate: below the block; ``None`` where there is none.
        bias: of the selection bias below the block's ``gate``; ``None`` where there is none.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str | None = None
    shared_gate: str | None = None
    bias: str | None = None


class StockFormat(ABC):
    """A stock architecture; subclasses map the configs."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    limits: ClassVar[Limits]
    names: ClassVar[Names] = Names()

    def refusals(self, config: MoEConfig) -> list[str]:
        """What is beyond ``limits``."""
        return refusals(config, self.limits, self.name)

    def notes(self, config: MoEConfig) -> list[str]:
        """Rewritings that all architectures share; subclasses add theirs."""
        scale = self._gate(config).rule.route_scale
        if self._folds_scale and scale != 1.0:
            return [f"moe.router.route_scale={scale} is multiplied into the experts' down_proj"]
        return []

    def to_stock(self, config: MoEConfig) -> PreTrainedConfig:
        """The architecture's config."""
        text_config = decoder_config(config)
        if text_config.model_type == self.name:
            fields = {key: value for key, value in text_config.to_dict().items() if key not in ("dtype", "model_type")}
        else:
            fields = common_fields(text_config) | {"head_dim": head_dim(text_config)}
        made = self.config_class(**(fields | self._stock_fields(config, self._gate(config))))
        made.architectures = [self.architecture]
        return made

    @abstractmethod
    def from_stock(self, config: PreTrainedConfig) -> MoEConfig:
        """The same model as ours."""

    @abstractmethod
    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        """Fields of the architecture's config for the MoE and the attention."""

    @property
    def _folds_scale(self) -> bool:
        """Sigmoid routers have a scale of their own."""
        return self.limits.score == "softmax"

    def _gate(self, config: MoEConfig) -> Gate:
        gate = gate_of(config.spec)
        assert gate is not None, "checked by `refusals`"
        return gate

    def added(self, config: MoEConfig, dtype: torch.dtype, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def is_moe_tensor(self, name: str) -> bool:
        """What is below the block."""
        return f".{self.names.block}." in name

    def rewrite(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """The weights that do the same in this architecture."""
        scale = self._gate(config).rule.route_scale
        if self._folds_scale and scale != 1.0:
            weights = replace(weights, down_EDF=scaled(weights.down_EDF, scale))
        return weights

    def write_layer(self, config: MoEConfig, weights: MoEWeights, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Gate, experts one by one, shared experts."""
        weights, names = self.rewrite(config, weights), self.names
        block = f"{prefix}{names.block}"
        yield f"{block}.gate.weight", weights.router["weight"]
        if names.bias is not None:
            bias_E = weights.router.get("bias_E")
            if bias_E is None:
                bias_E = torch.zeros(len(weights.down_EDF))
            yield f"{block}.gate.{names.bias}", bias_E.float()
        for expert, (gate_up_HD, down_DF) in enumerate(zip(weights.gate_up_EHD, weights.down_EDF, strict=True)):
            yield from self._ffn(f"{block}.experts.{expert}", gate_up_HD, down_DF)
        if names.shared is not None:
            assert weights.shared_gate_up_HD is not None and weights.shared_down_DF is not None
            yield from self._ffn(f"{block}.{names.shared}", weights.shared_gate_up_HD, weights.shared_down_DF)
        if names.shared_gate is not None:
            assert weights.shared_gate_1D is not None
            yield f"{block}.{names.shared_gate}.weight", weights.shared_gate_1D

    def _ffn(self, prefix: str, gate_up_HD: Tensor, down_DF: Tensor) -> Iterator[tuple[str, Tensor]]:
        gate_FD, up_FD = gate_up_HD.chunk(2)
        yield f"{prefix}.{self.names.gate}.weight", gate_FD
        yield f"{prefix}.{self.names.up}.weight", up_FD
        yield f"{prefix}.{self.names.down}.weight", down_DF

    def read_layer(self, config: PreTrainedConfig, folder: ModelFolder, prefix: str) -> MoEWeights:
        """Experts stacked; shared experts padded with dead neurons to a whole number of experts."""
        names, block = self.names, f"{prefix}{self.names.block}"
        router = {"weight": folder.read(f"{block}.gate.weight")}
        if names.bias is not None:
            router["bias_E"] = folder.read(f"{block}.gate.{names.bias}").float()
        shapes = {part: folder.shape(f"{block}.experts.0.{part}.weight") for part in (names.gate, names.down)}
        (width, dim), num_experts = shapes[names.gate], len(router["weight"])
        first = folder.read(f"{block}.experts.0.{names.gate}.weight")
        gate_up_EHD = first.new_empty(num_experts, 2 * width, dim)
        down_EDF = first.new_empty(num_experts, *shapes[names.down])
        for expert in range(num_experts):
            stem = f"{block}.experts.{expert}"
            gate_up_EHD[expert, :width] = folder.read(f"{stem}.{names.gate}.weight")
            gate_up_EHD[expert, width:] = folder.read(f"{stem}.{names.up}.weight")
            down_EDF[expert] = folder.read(f"{stem}.{names.down}.weight")
        weights = MoEWeights(router=router, gate_up_EHD=gate_up_EHD, down_EDF=down_EDF)
        if names.shared is None or f"{block}.{names.shared}.{names.up}.weight" not in folder:
            return weights
        parts = [folder.read(f"{block}.{names.shared}.{part}.weight") for part in (names.gate, names.up, names.down)]
        dead = -len(parts[0]) % width
        gate_SD, up_SD = (F.pad(part, (0, 0, 0, dead)) for part in parts[:2])
        shared_gate = f"{block}.{names.shared_gate}.weight"
        return replace(
            weights,
            shared_gate_up_HD=torch.cat((gate_SD, up_SD)),
            shared_down_DF=F.pad(parts[2], (0, dead)),
            shared_gate_1D=folder.read(shared_gate) if names.shared_gate is not None else None,
        )


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product in the tensor's own dtype, rounded once; row by row, to spare memory."""
    return torch.stack([(row.double() * factor).to(tensor.dtype) for row in tensor])


def zero_shared(weights: MoEWeights, width: int) -> MoEWeights:
    """With shared experts of ``width`` that give zero, for architectures that always have some."""
    down_EDF = weights.down_EDF
    dim = down_EDF.shape[1]
    return replace(
        weights, shared_gate_up_HD=down_EDF.new_zeros(2 * width, dim), shared_down_DF=down_EDF.new_zeros(dim, width)
    )


def aux_coef_from_stock(config: Any, num_moe_layers: int) -> float:
    """`BalanceConfig.aux_coef` of a stock ``router_aux_loss_coef``.

    Transformers' loss is K at balance, ours 1; and it pools the layers, while we add them up. With the same load in all layers
    both have the same gradient.
    """
    return config.router_aux_loss_coef * config.num_experts_per_tok / num_moe_layers


def aux_coef_to_stock(config: MoEConfig, top_k: int, num_moe_layers: int) -> float:
    """``router_aux_loss_coef``, the inverse of `aux_coef_from_stock` without its rounding."""
    return float(f"{config.spec.balance.aux_coef * num_moe_layers / top_k:.12g}")
