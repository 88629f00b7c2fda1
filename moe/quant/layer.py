"""The matrices of a decoder layer that are quantised, whatever the layer is made of.

Every `nn.Linear` is, but for the sigmoid gate of shared experts, and each expert of an `ExpertBank` by itself. Routers, norms,
biases, embeddings and the unembedding stay as they are.

Legend: P output rows, Q reduced columns, E experts, H = 2F (SwiGLU) or F (GELU), D model, F expert FFN.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe.experts import ExpertBank
from moe.layer import MoELayer

SHARED_GATE = "shared_experts.gate"
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix.

    Attributes:
        name: of its parameter below ``model.layers.N.``: ``self_attn.q_proj.weight``, ``mlp.experts.gate_up_proj``.
        expert: which of the stack it is; ``None`` for a matrix of its own.
        weight_PQ: a view of the layer's parameter: writing to it changes the layer.
    """

    name: str
    expert: int | None
    weight_PQ: Tensor

    @property
    def label(self) -> str:
        """For people."""
        return self.name.removesuffix(".weight") + ("" if self.expert is None else f", expert {self.expert}")


def moe_of(layer: nn.Module) -> MoELayer | None:
    """The layer's `MoELayer`; ``None`` in a dense layer."""
    ffn = getattr(layer, "mlp", None)
    return ffn if isinstance(ffn, MoELayer) else None


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Those that are quantised, by module name."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(SHARED_GATE)
    }


def banks(layer: nn.Module) -> dict[str, ExpertBank]:
    """Stacks of experts by module name; at most one."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, ExpertBank)}


def matrices(layer: nn.Module) -> Iterator[Matrix]:
    """All matrices to quantise, in the order in which the layer uses them."""
    for name, linear in linears(layer).items():
        yield Matrix(name=f"{name}.weight", expert=None, weight_PQ=linear.weight.data)
    for name, bank in banks(layer).items():
        for part in ("gate_up_proj", "down_proj"):
            for expert, weight_PQ in enumerate(getattr(bank, part).data):
                yield Matrix(name=f"{name}.{part}", expert=expert, weight_PQ=weight_PQ)
