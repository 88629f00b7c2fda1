"""Finds the sites of a decoder layer, and checks on captured rows that scales there change nothing.

Names say where to look, as transformers' decoders share them. Whether a norm made the rows, what a head of o reads of v, whether
a dense FFN is linear in its up-projection and a router in its input is then tried. Where that fails the site is left out, with a
note.

Legend: T tokens, D model, Q columns, S scales of a site, F FFN, H = 2F, E experts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.quant.inputs import LayerInputs, Rows
from moe.quant.layer import Matrix, linears, matrices, moe_of
from moe.quant.scaling.norms import Gain, find_gain
from moe.quant.scaling.sites import Reader, Site
from moe.routers import Router
from moe.types import NO_INFO, SoftRouting

_TOLERANCE = 1e-3
_PROBE_ROWS = 64


@dataclass(kw_only=True)
class Sites:
    """Of one layer.

    Attributes:
        found: in the order in which the layer computes.
        notes: what was left out, and why.
    """

    found: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def find_sites(layer: nn.Module, inputs: LayerInputs, rounds_router: bool = False) -> Sites:
    """All sites of a decoder layer (fp32, in evaluation); see `scale_layer`."""
    finder = _Finder(layer, inputs, rounds_router)
    finder.attention()
    finder.value()
    finder.ffn()
    finder.up()
    return finder.sites


class _Finder:
    """Collects `Sites`."""

    def __init__(self, layer: nn.Module, inputs: LayerInputs, rounds_router: bool) -> None:
        self.layer, self.inputs, self.sites, self.rounds_router = layer, inputs, Sites(), rounds_router
        self.moe, self.linears = moe_of(layer), linears(layer)
        self.matrices = {(matrix.name, matrix.expert): matrix for matrix in matrices(layer)}

    def attention(self) -> None:
        """Input norm -> q, k, v."""
        names = [name for name in self.linears if name.startswith("self_attn.")]
        if not names:
            self._leave_out("attention", "the layer has no self_attn")
            return
        readers = self._reading_the_same(names[0])
        self._after_norm("attention", "input_layernorm", readers, "self_attn.", self.inputs.linear[names[0]])

    def value(self) -> None:
        """v -> o."""
        attention: Any = getattr(self.layer, "self_attn", None)
        v, o = (self.linears.get(f"self_attn.{name}_proj") for name in ("v", "o"))
        head_dim = getattr(attention, "head_dim", None)
        if v is None or o is None or not head_dim:
            self._leave_out("value", "its attention has no v_proj and o_proj with heads")
            return
        num_kv_heads = v.out_features // head_dim
        per_kv_head = o.in_features // v.out_features
        is_grouped = per_kv_head > 1
        channels_S = torch.arange(v.out_features, device=v.weight.device).view(num_kv_heads, 1, head_dim)
        scale_of_Q = channels_S.expand(-1, per_kv_head, -1).reshape(-1)
        rows_TQ = self.inputs.linear["self_attn.o_proj"]
        # The first token of a text attends to itself alone.
        value_S = v(self.inputs.linear["self_attn.v_proj"][0])
        if len(scale_of_Q) != o.in_features or not _close(value_S[scale_of_Q], rows_TQ[0]):
            self._leave_out("value", "o_proj reads something else than the heads' weighted sums of v_proj")
            return
        self.sites.found.append(
            Site(
                name="v_proj -> o_proj",
                kind="value",
                readers=[self._linear_reader("self_attn.o_proj")],
                divide=partial(_divide_rows, v, slice(None), [rows_TQ], scale_of_Q),
                scale_of_Q=scale_of_Q if is_grouped else None,
            )
        )

    def ffn(self) -> None:
        """Norm -> FFN."""
        sandwich = hasattr(self.layer, "pre_feedforward_layernorm")
        norm = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        if self.moe is None:
            names = [name for name in self.linears if name.startswith("mlp.")]
            self._after_norm("dense", norm, self._reading_the_same(names[0]), "mlp.", self.inputs.linear[names[0]])
            return
        assert self.inputs.ffn_TD is not None
        if problem := router_problem(self.moe.router, self.inputs.ffn_TD):
            self._leave_out("moe", problem)
            return
        self._after_norm("moe", norm, self._moe_readers(self.moe), "mlp.", self.inputs.ffn_TD)

    def up(self) -> None:
        """Up rows -> down columns."""
        if self.moe is None:
            self._dense_up()
            return
        if self.moe.experts.activation != "swiglu":
            self._leave_out("up", f"{self.moe.experts.activation} experts are not linear in their up-projection")
            return
        if self.moe.shared_experts is not None:
            name = "mlp.shared_experts.down_proj"
            up = self.moe.shared_experts.gate_up_proj
            divide = partial(_divide_rows, up, slice(up.out_features // 2, None), [self.inputs.linear[name]], None)
            self._up_site("shared experts", divide, self._linear_reader(name))
        for expert, gate_up_HD in enumerate(self.moe.experts.gate_up_proj.data):
            up_FD = gate_up_HD[len(gate_up_HD) // 2 :]
            reader = self._reader(self.matrices["mlp.experts.down_proj", expert])
            self._up_site(f"expert {expert}", partial(_divide_weight, up_FD), reader)

    def _dense_up(self) -> None:
        ffn: Any = self.layer.get_submodule("mlp")
        parts = [self.linears.get(f"mlp.{name}_proj") for name in ("gate", "up", "down")]
        gate, up, down = parts
        if gate is None or up is None or down is None or not hasattr(ffn, "act_fn"):
            self._leave_out("up", "its dense FFN has no gate_proj, up_proj and down_proj")
            return
        x_TD, rows_TF = self.inputs.linear["mlp.up_proj"], self.inputs.linear["mlp.down_proj"]
        if not _close(ffn.act_fn(gate(x_TD[:_PROBE_ROWS])) * up(x_TD[:_PROBE_ROWS]), rows_TF[:_PROBE_ROWS]):
            self._leave_out("up", "its dense FFN is not linear in up_proj")
            return
        divide = partial(_divide_rows, up, slice(None), [rows_TF], None)
        self._up_site("FFN", divide, self._linear_reader("mlp.down_proj"))

    def _up_site(self, owner: str, divide: Callable[[Tensor], None], reader: Reader) -> None:
        self.sites.found.append(Site(name=f"up -> down, {owner}", kind="up", readers=[reader], divide=divide))

    def _moe_readers(self, moe: MoELayer) -> list[Reader]:
        def all_rows() -> Rows:
            x_TD = self.inputs.calibration_TD
            return Rows(x_nQ=x_TD, weights_n=x_TD.new_ones(len(x_TD)))

        readers = [
            Reader(
                name=f"router.{name}",
                weight_PQ=weight.data,
                rows=all_rows,
                is_quantized=False,
                is_rounded_router=self.rounds_router,
            )
            for name, weight in router_matrices(moe.router).items()
        ]
        if moe.shared_experts is not None:
            if (gate := moe.shared_experts.gate) is not None:
                name = "shared_experts.gate"
                readers.append(Reader(name=name, weight_PQ=gate.weight.data, rows=all_rows, is_quantized=False))
            readers.append(self._linear_reader("mlp.shared_experts.gate_up_proj"))
        for (name, _), matrix in self.matrices.items():
            if name == "mlp.experts.gate_up_proj":
                readers.append(self._reader(matrix))
        return readers

    def _after_norm(self, kind: str, norm_name: str, readers: list[Reader], prefix: str, x_TD: Tensor) -> None:
        norm = getattr(self.layer, norm_name, None)
        gain = None if norm is None else find_gain(norm)
        others = [name for name in self._names_of(x_TD) if not name.startswith(prefix)]
        if norm is None:
            self._leave_out(kind, f"the layer has no {norm_name}")
        elif gain is None:
            self._leave_out(kind, f"{type(norm).__name__} is not a gain times a normalised vector")
        elif not gain.made(x_TD):
            self._leave_out(kind, f"its input is not the output of {norm_name}")
        elif others:
            self._leave_out(kind, f"{others[0]} reads the output of {norm_name} too")
        else:
            rows = [self.inputs.linear[name] for name in self._names_of(x_TD)] + [x_TD]
            if kind == "moe" and self.moe is not None and self.moe.shared_experts is not None:
                rows.append(self.inputs.linear["mlp.shared_experts.gate_up_proj"])
            self.sites.found.append(
                Site(
                    name=f"{norm_name} -> {kind}",
                    kind=kind,
                    readers=readers,
                    divide=partial(_divide_gain, gain, rows),
                    storable=gain.storable,
                )
            )

    def _names_of(self, x_TD: Tensor) -> list[str]:
        """Linears whose captured rows are ``x_TD``."""
        return [
            name
            for name, rows_TQ in self.inputs.linear.items()
            if rows_TQ is x_TD or (rows_TQ.shape == x_TD.shape and torch.equal(rows_TQ, x_TD))
        ]

    def _reading_the_same(self, name: str) -> list[Reader]:
        return [self._linear_reader(other) for other in self._names_of(self.inputs.linear[name])]

    def _linear_reader(self, name: str) -> Reader:
        return self._reader(self.matrices[f"{name}.weight", None])

    def _reader(self, matrix: Matrix) -> Reader:
        return Reader(
            name=matrix.label,
            weight_PQ=matrix.weight_PQ,
            rows=lambda: self.inputs.rows(self.layer, matrix),
        )

    def _leave_out(self, kind: str, why: str) -> None:
        self.sites.notes.append(f"{kind} not scaled: {why}")


def _divide_gain(gain: Gain, rows: list[Tensor], scale_S: Tensor) -> None:
    gain.divide(scale_S)
    _divide_captured(rows, scale_S)


def _divide_rows(
    linear: nn.Linear, part: slice, rows: list[Tensor], scale_of_Q: Tensor | None, scale_S: Tensor
) -> None:
    """Of a linear's output, and what was captured of it further on."""
    _divide_weight(linear.weight.data[part], scale_S)
    if linear.bias is not None:
        linear.bias.data[part].div_(scale_S)
    _divide_captured(rows, scale_S if scale_of_Q is None else scale_S[scale_of_Q])


def _divide_weight(weight_SQ: Tensor, scale_S: Tensor) -> None:
    weight_SQ.div_(scale_S[:, None])


def _divide_captured(rows: list[Tensor], scale_Q: Tensor) -> None:
    """In place, since rows are most of the memory; tensors that share storage once."""
    longest: dict[int, Tensor] = {}
    for x_TQ in rows:
        known = longest.get(x_TQ.data_ptr())
        longest[x_TQ.data_ptr()] = x_TQ if known is None or len(x_TQ) > len(known) else known
    for x_TQ in longest.values():
        x_TQ.div_(scale_Q)


def router_matrices(router: Router) -> dict[str, nn.Parameter]:
    """Parameters that the router's input is multiplied by."""
    return {name: weight for name, weight in router.named_parameters() if weight.dim() == 2}


def router_problem(router: Router, x_TD: Tensor) -> str | None:
    """Why a router's input cannot be scaled; seen by doing it to a copy."""
    if not router_matrices(router) and not any(buffer.is_floating_point() for buffer in router.buffers()):
        return None  # it does not look at vectors
    x_TD = x_TD[:_PROBE_ROWS]
    scale_D = torch.linspace(0.5, 2, x_TD.shape[1], device=x_TD.device)
    trial = copy.deepcopy(router).eval()
    for weight in router_matrices(trial).values():
        weight.data.mul_(scale_D)
    routing, scaled = router(x_TD, NO_INFO), trial(x_TD / scale_D, NO_INFO)
    pairs = [(routing.logits_TE, scaled.logits_TE), (routing.probs_TE, scaled.probs_TE)]
    if not isinstance(routing, SoftRouting):
        pairs.append((routing.weights_N, scaled.weights_N))
    if all(one is None or (one.shape == other.shape and _close(one, other)) for one, other in pairs):
        return None
    return f"{type(router).__name__} is not a function of a product with its weights"


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max().clamp_min(1e-6))
