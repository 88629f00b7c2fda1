"""Carries calibration text through an MoE model, layer by layer, and notes what the matrices of a layer see.

In memory are one layer, the residual stream and what was noted.

Legend: B windows, L window length, T = B * L tokens, D model, Q reduced columns, E experts, N assignments.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.models.folder import ModelFolder
from moe.models.modeling import MoEForCausalLM
from moe.models.stock.decoder import decoder_config
from moe.models.stock.reformat import reformat
from moe.models.walk import DecoderWalk, embed
from moe.quant.layer import linears, moe_of
from moe.types import Routing, SoftRouting


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Which experts T tokens went to.

    Attributes:
        token_ids_N, expert_ids_N: int64, of each assignment.
        weights_N: fp32 combine weights.
        scores_TE: fp32 probabilities of the router; ``None`` where it has none (hashes).
        num_tokens: T.
        num_experts: E.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    scores_TE: Tensor | None
    num_tokens: int
    num_experts: int

    @property
    def counts_E(self) -> Tensor:
        """(E,) int64 tokens of each expert."""
        return torch.bincount(self.expert_ids_N, minlength=self.num_experts)

    def chosen_TE(self) -> Tensor:
        """(T, E) bool."""
        chosen_TE = torch.zeros(self.num_tokens, self.num_experts, dtype=torch.bool, device=self.token_ids_N.device)
        chosen_TE[self.token_ids_N, self.expert_ids_N] = True
        return chosen_TE


@dataclass(kw_only=True)
class Seen:
    """What one run of a layer noted.

    Attributes:
        linear: (T, Q) fp32 inputs of linear layers by their names; those that see the same share one tensor.
        ffn_TD: fp32 input of the MoE; ``None`` in a dense layer.
        routed: its routing.
        after_BLD: the residual stream after the layer, on CPU.
    """

    after_BLD: Tensor
    linear: dict[str, Tensor] = field(default_factory=dict)
    ffn_TD: Tensor | None = None
    routed: Routed | None = None


class QuantWalk:
    """An MoE model's layers, one at a time.

    Args:
        source: a folder in any format of `moe.models.stock.FORMATS`.
        batch_size: windows at a time.
        device: where layers compute and inputs are noted.

    Raises:
        ValueError: we cannot express the model, or not walk through it.
    """

    def __init__(self, source: ModelFolder, batch_size: int = 2, device: torch.device | str = "cpu") -> None:
        self._source, self._conversion = source, reformat(source)
        self.config = self._conversion.config
        with torch.device("meta"):
            model = MoEForCausalLM(self.config).eval()
        self._context = model.routing_context
        self._walk = DecoderWalk(model.model, decoder_config(self.config), batch_size, device=device)
        self._device = torch.device(device)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self._walk.num_layers

    def empty(self, layer: int) -> nn.Module:
        """A layer without weights."""
        return self._walk.layer(layer)

    def embed(self, windows_BL: Tensor) -> Tensor:
        """The residual stream before the first layer (B, L, D)."""
        return embed(self._source, windows_BL)

    def stored(self, layer: int) -> dict[str, Tensor]:
        """Weights of a layer as the checkpoint has them, under our names below ``model.layers.N.``.

        Raises:
            ValueError: one of them is not finite; names it.
        """
        prefix = f"model.layers.{layer}."
        found: dict[str, Tensor] = {}
        if self.config.spec.is_moe_layer(layer):
            found |= self._conversion.layer_weights(layer).named("mlp.")
        for name in self._walk.layer(layer).state_dict():
            if name not in found:
                found[name] = self._source.read(prefix + name)
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{self._source.path}: {prefix}{name} has values that are not finite; repair the model"
                )
        return found

    def load(self, layer: int, stored: dict[str, Tensor]) -> nn.Module:
        """The layer with weights in fp32, where it computes."""
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
        return self._walk.load(layer, state)

    def unload(self, layer: int) -> None:
        """Let go of it."""
        self._walk.unload(layer)

    def run(
        self,
        layer: int,
        hidden_BLD: Tensor,
        windows_BL: Tensor,
        *,
        note_linear: bool = False,
        note_ffn: bool = False,
    ) -> Seen:
        """Run the loaded layer, and note how its MoE routes.

        Args:
            layer: its index.
            hidden_BLD: the residual stream before it.
            windows_BL: the token ids, which some routers read.
            note_linear: note inputs of linear layers as well.
            note_ffn: and of the MoE.
        """
        module = self._walk.layer(layer)
        notes = _Notes()
        hooks = []
        if note_linear:
            hooks += [linear.register_forward_pre_hook(notes.of(name)) for name, linear in linears(module).items()]
        if (moe := moe_of(module)) is not None:
            if note_ffn:
                hooks.append(moe.register_forward_pre_hook(notes.of("mlp")))
            hooks.append(
                moe.router.register_forward_hook(lambda _, args, routing: notes.routings.append(_routed(routing)))
            )

        def tell_ids(windows: slice) -> None:
            self._context.input_ids_T = windows_BL[windows].reshape(-1).to(self._device)

        try:
            after = [after_BLD.cpu() for after_BLD in self._walk.run(hidden_BLD, tell_ids)]
        finally:
            self._context.input_ids_T = None
            for hook in hooks:
                hook.remove()
        seen = Seen(after_BLD=torch.cat(after), linear=notes.inputs())
        if moe is not None:
            seen.ffn_TD = seen.linear.pop("mlp", None)
            seen.routed = joined(notes.routings)
        return seen


class _Notes:
    """Inputs of modules; modules with the same input are noted once."""

    def __init__(self) -> None:
        self.routings: list[Routed] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._same: dict[str, str] = {}
        # Noted tensors live on, so an address stays that of one input.
        self._owners: dict[tuple[int, torch.Size], str] = {}

    def of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook that notes the input of the module ``name``."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x_TQ = args[0].flatten(0, -2).float()
            owner = self._owners.setdefault((x_TQ.data_ptr(), x_TQ.shape), name)
            self._same[name] = owner
            if owner == name:
                self._parts.setdefault(name, []).append(x_TQ)

        return note

    def inputs(self) -> dict[str, Tensor]:
        """By module name; this empties the notes."""
        whole = {}
        for name in list(self._parts):
            whole[name] = torch.cat(self._parts.pop(name))
        return {name: whole[owner] for name, owner in self._same.items()}


def joined(parts: Sequence[Routed]) -> Routed:
    """Of texts one after the other."""
    starts = itertools.accumulate((part.num_tokens for part in parts), initial=0)
    scores = [part.scores_TE for part in parts if part.scores_TE is not None]
    return Routed(
        token_ids_N=torch.cat([part.token_ids_N + start for part, start in zip(parts, starts, strict=False)]),
        expert_ids_N=torch.cat([part.expert_ids_N for part in parts]),
        weights_N=torch.cat([part.weights_N for part in parts]),
        scores_TE=torch.cat(scores) if scores else None,
        num_tokens=sum(part.num_tokens for part in parts),
        num_experts=parts[0].num_experts,
    )


def _routed(routing: Routing | SoftRouting) -> Routed:
    """Of a batch."""
    if isinstance(routing, SoftRouting):
        raise ValueError(
            "the router mixes tokens into slots (SoftRouting), so experts have no tokens of their own to be calibrated on; "
            "quantize a model with a sparse router"
        )
    scores_TE = routing.probs_TE
    if scores_TE is None and routing.logits_TE is not None:
        scores_TE = routing.logits_TE.float().softmax(-1)
    return Routed(
        token_ids_N=routing.token_ids_N,
        expert_ids_N=routing.expert_ids_N,
        weights_N=routing.weights_N.float(),
        scores_TE=None if scores_TE is None else scores_TE.float(),
        num_tokens=routing.num_tokens,
        num_experts=routing.num_experts,
    )
