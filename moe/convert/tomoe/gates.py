"""Gates in a frozen dense model: each token's neurons are masked by the expert that a linear router chooses for it.

The FFN itself is left alone: one hook reads its input on the way into the up-projection, another multiplies what goes into the
down-projection. With the gates off the model is its own teacher.

Legend: T tokens, D model, E experts, F neurons.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.convert.dense import ffn_names
from moe.convert.tomoe.hypernet import sample_choices


class Gate(nn.Module):
    """Router of one layer, and the masks among which it chooses.

    Args:
        dim: D.
        num_experts: E.

    Attributes:
        masks_EF: (E, F) 0 or 1; set before each forward of the model.
        sample: gives one-hot choices from logits, with noise; ``None`` takes the largest logit.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.masks_EF: Tensor | None = None
        self.sample: Callable[[Tensor], Tensor] | None = None
        self._logits_TE: Tensor | None = None
        self._mask: Tensor | None = None

    @property
    def last_logits_TE(self) -> Tensor:
        """(T, E) fp32 of the last forward."""
        assert self._logits_TE is not None, "the model has not run"
        return self._logits_TE

    def read(self, x: Tensor) -> None:
        """Choose masks for the FFN's input (..., D)."""
        assert self.masks_EF is not None
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.float())
            self._logits_TE = logits_TE = logits.flatten(0, -2)
            if self.sample is None:
                choices_TE = F.one_hot(logits_TE.argmax(-1), logits_TE.shape[-1]).to(logits_TE.dtype)
            else:
                choices_TE = self.sample(logits_TE)
            self._mask = (choices_TE @ self.masks_EF).view(*logits.shape[:-1], -1)

    def mask(self, hidden: Tensor) -> Tensor:
        """Hidden units (..., F) of the chosen experts."""
        assert self._mask is not None, "the down-projection ran before the up-projection"
        mask, self._mask = self._mask, None
        return hidden * mask.to(hidden.dtype)


class GatedModel:
    """A dense model with a gate in every layer.

    Args:
        model: a dense decoder of transformers; its weights are frozen.
        num_experts: E.

    Attributes:
        gates: one per layer, on the model's device.
        on: whether they act.
    """

    def __init__(self, model: Any, num_experts: int) -> None:
        names = ffn_names(model.config)
        self.model = model.requires_grad_(False).eval()
        self.on = False
        dim, device = model.config.hidden_size, next(model.parameters()).device
        self.gates = [Gate(dim, num_experts).to(device) for _ in model.model.layers]
        self._hooks = []
        for layer, gate in zip(model.model.layers, self.gates, strict=True):
            up, down = layer.get_submodule(names.up), layer.get_submodule(names.down)
            self._hooks += [up.register_forward_pre_hook(self._reader(gate))]
            self._hooks += [down.register_forward_pre_hook(self._masker(gate))]

    def _reader(self, gate: Gate) -> Callable[..., None]:
        return lambda module, inputs: gate.read(inputs[0]) if self.on else None

    def _masker(self, gate: Gate) -> Callable[..., tuple[Tensor] | None]:
        return lambda module, inputs: (gate.mask(inputs[0]),) if self.on else None

    def set_masks(self, masks_LEF: Tensor) -> None:
        """Masks of all layers for the forwards that follow."""
        for gate, masks_EF in zip(self.gates, masks_LEF, strict=True):
            gate.masks_EF = masks_EF

    def set_noise(self, temperature: float | None, generator: torch.Generator | None = None) -> None:
        """Draw the choices at a temperature, or with ``None`` take the largest logit."""
        for gate in self.gates:
            if temperature is None:
                gate.sample = None
            else:
                assert generator is not None
                gate.sample = lambda logits_TE: sample_choices(logits_TE, temperature, generator)

    def logits(self, input_ids_BL: Tensor, on: bool) -> Tensor:
        """(B, L, V) with or without the gates."""
        self.on = on
        try:
            return self.model(input_ids=input_ids_BL, use_cache=False).logits
        finally:
            self.on = False

    def remove(self) -> None:
        """Take the gates out of the model."""
        for hook in self._hooks:
            hook.remove()
