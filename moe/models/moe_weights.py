"""The weights of one MoE layer, as conversions and stock formats pass them to each other.

Legend: D model, F expert FFN, H = 2F (SwiGLU: gate rows, then up rows) or F, E routed experts, S shared experts' FFN width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.models.folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """One layer in the form in which `MoELayer` holds it; any floating dtype.

    Attributes:
        router: parameters and buffers of the router by its own names: ``weight`` (E, D) and ``bias_E`` of the top-k family.
        gate_up_EHD: experts' ``gate_up_proj``.
        down_EDF: experts' ``down_proj``.
        shared_gate_up_HD: of the fused shared experts (2S, D), or ``None`` where there are none.
        shared_down_DF: (D, S).
        shared_gate_1D: (1, D) of the shared experts' sigmoid gate, or ``None``.
    """

    router: dict[str, Tensor] = field(default_factory=dict)
    gate_up_EHD: Tensor
    down_EDF: Tensor
    shared_gate_up_HD: Tensor | None = None
    shared_down_DF: Tensor | None = None
    shared_gate_1D: Tensor | None = None

    def named(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors in the state of `MoEForCausalLM`, ``prefix`` being ``model.layers.N.mlp.``."""
        yield from ((f"{prefix}router.{name}", tensor) for name, tensor in self.router.items())
        parts = {
            "experts.gate_up_proj": self.gate_up_EHD,
            "experts.down_proj": self.down_EDF,
            "shared_experts.gate_up_proj.weight": self.shared_gate_up_HD,
            "shared_experts.down_proj.weight": self.shared_down_DF,
            "shared_experts.gate.weight": self.shared_gate_1D,
        }
        yield from ((prefix + name, tensor) for name, tensor in parts.items() if tensor is not None)

    @classmethod
    def read(cls, folder: ModelFolder, prefix: str) -> "MoEWeights":
        """The layer at ``prefix`` of a folder of `MoEForCausalLM`.

        Around decoders of architectures that have experts themselves, such as OLMoE, `save_pretrained` writes the experts one
        by one, in the form of those.
        """

        def get(name: str) -> Tensor | None:
            return folder.read(prefix + name) if prefix + name in folder else None

        start = f"{prefix}router."
        return cls(
            router={name.removeprefix(start): folder.read(name) for name in folder.names if name.startswith(start)},
            gate_up_EHD=_stacked(folder, prefix, "gate_up_proj", ("gate_proj", "up_proj")),
            down_EDF=_stacked(folder, prefix, "down_proj", ("down_proj",)),
            shared_gate_up_HD=get("shared_experts.gate_up_proj.weight"),
            shared_down_DF=get("shared_experts.down_proj.weight"),
            shared_gate_1D=get("shared_experts.gate.weight"),
        )


def _stacked(folder: ModelFolder, prefix: str, name: str, parts: tuple[str, ...]) -> Tensor:
    """A weight of all experts, stored whole or as parts of each."""
    if f"{prefix}experts.{name}" in folder:
        return folder.read(f"{prefix}experts.{name}")
    found: list[Tensor] = []
    while (stem := f"{prefix}experts.{len(found)}.") + f"{parts[0]}.weight" in folder:
        found.append(torch.cat([folder.read(f"{stem}{part}.weight") for part in parts]))
    if not found:
        raise ValueError(f"{folder.path} has no tensor {prefix}experts.{name}")
    return torch.stack(found)
