"""Whether a model of ours is expressible in a stock architecture, and what of it is not.

An architecture says in `Limits` what it can do; `refusals` names every property of a model beyond that, with its value.
"""

from dataclasses import dataclass
from typing import Any, Literal

from moe.layer import MoESpec
from moe.models.config import MoEConfig
from moe.models.stock.decoder import Decoder, decoder_config, describe, head_dim
from moe.routers import parse_router
from moe.routers.topk import TopKConfig
from moe.types import TopKRule

# Routers that are, in evaluation, a linear gate and a top-k rule; of those below the first line `TopKConfig` has the rule.
_PLAIN_GATES = ("topk", "noaux_tc", "switch", "noisy_topk")
_GSHARD_RULE = TopKRule(top_k=2, softmax_order="after")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an architecture can do.

    Attributes:
        score: of its router; the selection bias and groups go with the sigmoid, and with "any".
        renormalize: whether it divides weights by their sum; ``None`` where its config says so.
        shared: shared experts: none, with a gate per token ("gated"), or without ("plain").
        dense_layers: which layers may stay dense: "none", the "first" ones, or "any".
        qkv_bias, output_bias, qk_norm: what its attention may have (see `Decoder`).
        windows: sliding windows: "none", or one for all layers ("uniform").
        any_head_dim: whether a head may be another width than ``hidden_size / num_attention_heads``.
    """

    score: Literal["softmax", "sigmoid", "any"]
    renormalize: bool | None
    shared: Literal["none", "gated", "plain"]
    dense_layers: Literal["none", "first", "any"]
    qkv_bias: tuple[bool, ...] = (False,)
    output_bias: tuple[bool, ...] = (False,)
    qk_norm: tuple[bool, ...] = (False,)
    windows: Literal["none", "uniform"] = "none"
    any_head_dim: bool = True


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A linear gate with its rule.

    Attributes:
        rule: `TopKRule`; its ``renormalize`` is True also where the softmax is taken over the chosen.
        selection_bias: it has one.
    """

    rule: TopKRule
    selection_bias: bool

    @property
    def gives_unit_weight(self) -> bool:
        """One expert with weight 1, so that the score only orders experts: softmax and sigmoid do the same."""
        return self.rule.top_k == 1 and self.rule.renormalize and not self.selection_bias and self.rule.num_groups == 1


def gate_of(spec: MoESpec) -> Gate | None:
    """The router as it evaluates, or ``None`` where it is no linear gate with a top-k rule."""
    name, config = spec.router.get("name", "topk"), parse_router(spec.router)[1]
    if name == "gshard":
        config = TopKConfig(top_k=2, softmax_order="after")
    elif name not in _PLAIN_GATES:
        return None
    assert isinstance(config, TopKConfig)
    after = config.score == "softmax" and config.softmax_order == "after"
    rule = TopKRule(
        top_k=config.top_k,
        score=config.score,
        renormalize=config.renormalize or after,
        num_groups=config.num_groups,
        top_k_groups=config.top_k_groups,
        route_scale=config.route_scale,
    )
    return Gate(rule=rule, selection_bias=config.selection_bias)


def refusals(config: MoEConfig, limits: Limits, own_type: str) -> list[str]:
    """What ``limits`` do not allow, one sentence per property with its value.

    Args:
        config: the model.
        limits: of the architecture.
        own_type: the architecture's ``model_type``; a decoder of that type was imported from it, and its attention fits.
    """
    spec, text_config = config.spec, decoder_config(config)
    found = _of_gate(spec, limits) + _of_experts(spec, text_config, limits) + _of_layers(config, limits)
    if text_config.model_type == own_type:
        return found
    try:
        decoder = describe(text_config)
    except ValueError as problem:
        return [*found, str(problem)]
    found += of_attention(text_config, decoder, limits)
    if decoder.mlp_bias and (dense := dense_layers(config)):
        found.append(f"text_config.mlp_bias=true: its dense layers, here {dense}, have no bias")
    return found


def _of_gate(spec: MoESpec, limits: Limits) -> list[str]:
    gate = gate_of(spec)
    if gate is None:
        return [f"moe.router.name={spec.router.get('name')!r}: its router is a linear gate with top-k"]
    rule, found = gate.rule, []
    if limits.score not in ("any", rule.score) and not gate.gives_unit_weight:
        found.append(f"moe.router.score={rule.score!r}: its router takes the {limits.score}")
    if limits.renormalize and not rule.renormalize:
        found.append("moe.router.renormalize=false: it always divides weights by their sum")
    if limits.renormalize is False and rule.renormalize:
        found.append("moe.router.renormalize=true: it never divides weights by their sum")
    if limits.score == "softmax":
        if gate.selection_bias:
            found.append("moe.router.selection_bias=true: its router has no bias")
        if rule.num_groups > 1:
            found.append(f"moe.router.num_groups={rule.num_groups}: it has no groups of experts")
        return found
    if rule.num_groups > 1 and not gate.selection_bias:
        found.append(
            f"moe.router.num_groups={rule.num_groups} with moe.router.selection_bias=false: it scores a group by its two best "
            "experts, and without the bias we score it by the best one"
        )
    if spec.num_experts // rule.num_groups < 2:
        found.append(
            f"moe.num_experts={spec.num_experts} in moe.router.num_groups={rule.num_groups}: a group needs two"
        )
    return found


def _of_experts(spec: MoESpec, text_config: Any, limits: Limits) -> list[str]:
    found = []
    if spec.activation != "swiglu":
        found.append(f"moe.activation={spec.activation!r}: its experts are SwiGLU")
    if text_config.hidden_act not in ("silu", "swish"):
        found.append(f"text_config.hidden_act={text_config.hidden_act!r}: its servers compute silu")
    if spec.eval_capacity_factor is not None:
        found.append(f"moe.eval_capacity_factor={spec.eval_capacity_factor}: it drops no token; set it to null")
    if spec.num_shared_experts and limits.shared == "none":
        found.append(f"moe.num_shared_experts={spec.num_shared_experts}: it has no shared experts")
    if spec.shared_gate and limits.shared == "plain":
        found.append("moe.shared_gate=true: its shared experts have no gate")
    return found


def dense_layers(config: MoEConfig) -> list[int]:
    """Indices of the layers that are no MoEs."""
    spec = config.spec
    return [layer for layer in range(decoder_config(config).num_hidden_layers) if not spec.is_moe_layer(layer)]


def _of_layers(config: MoEConfig, limits: Limits) -> list[str]:
    spec, dense = config.spec, dense_layers(config)
    where = {
        "moe.first_dense_layers": spec.first_dense_layers or None,
        "moe.every": spec.every if spec.every != 1 else None,
        "moe.only_layers": None if spec.only_layers is None else list(spec.only_layers),
    }
    said = ", ".join(f"{name}={value}" for name, value in where.items() if value is not None)
    if dense and limits.dense_layers == "none":
        return [f"{said}: it has no dense layers, and these would be {dense}"]
    if limits.dense_layers == "first" and dense != list(range(len(dense))):
        return [f"{said}: its dense layers are the first ones, and these would be {dense}"]
    return []


def of_attention(text_config: Any, decoder: Decoder, limits: Limits) -> list[str]:
    """What of a dense decoder's attention, described by ``decoder``, ``limits`` do not allow."""
    found = []
    kind = f"text_config.model_type={text_config.model_type!r}"
    for name, has, allowed in (
        ("a bias of query, key and value", decoder.qkv_bias, limits.qkv_bias),
        ("a bias of the attention's output", decoder.output_bias, limits.output_bias),
        ("norms of queries and keys", decoder.qk_norm, limits.qk_norm),
    ):
        if has not in allowed:
            found.append(f"{kind} has {name}: it has none" if has else f"{kind} lacks {name}, which it always has")
    windows = set(decoder.windows)
    if windows != {None} and (limits.windows == "none" or len(windows) > 1):
        seen = max(window for window in windows if window is not None)
        number = sum(window is not None for window in decoder.windows)
        fits = "no layer has one" if limits.windows == "none" else "all layers have the same one"
        found.append(f"text_config.sliding_window={seen} in {number} of {len(decoder.windows)} layers: in it {fits}")
    if decoder.rotary_share != 1.0:
        found.append(
            f"text_config.rope_parameters has partial_rotary_factor={decoder.rotary_share}, which {kind} ignores"
        )
    if not limits.any_head_dim and head_dim(text_config) * text_config.num_attention_heads != text_config.hidden_size:
        found.append(
            f"text_config.head_dim={head_dim(text_config)}: its servers take hidden_size / num_attention_heads, "
            f"{text_config.hidden_size} / {text_config.num_attention_heads}"
        )
    return found
