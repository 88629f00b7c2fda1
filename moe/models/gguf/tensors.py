"""Which tensors a GGUF file has, in its order, and how to get each; no tensor is read before it is asked for.

Legend: D model, F expert FFN, E experts, S shared experts' FFN width.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe.models.gguf.architectures import Architecture
from moe.models.gguf.source import GGUFSource
from moe.models.moe_weights import MoEWeights

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Below ``model.layers.N.`` and ``blk.N.``.
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
# Small, and what decides: never in fewer bits.
IN_FP32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "exp_probs_b.bias", "rope_freqs.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the file.

    Attributes:
        name: as llama.cpp calls it.
        shape: in torch's order, which the file has reversed.
        read: gives it, in the dtype of the source.
        layer: its decoder layer; -1 outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    layer: int = -1

    @property
    def in_fp32(self) -> bool:
        """Whether it is stored in fp32 whatever the file's type."""
        return len(self.shape) == 1 or self.name.endswith(IN_FP32)


def plan_tensors(source: GGUFSource, architecture: Architecture) -> list[PlannedTensor]:
    """All tensors, those of a layer next to each other.

    Raises:
        ValueError: the folder has a tensor with no place in the file; names it.
    """
    plan: list[PlannedTensor] = []
    layers: dict[int, list[PlannedTensor]] = {layer: [] for layer in range(source.decoder.num_hidden_layers)}
    for name in source.folder.names:
        match = _LAYER.match(name)
        layer = int(match[1]) if match else -1
        if name.endswith("rotary_emb.inv_freq") or source.is_expert_tensor(layer, name):
            continue
        if layer >= len(layers):
            raise ValueError(f"{source.folder.path}: {name} is beyond num_hidden_layers={len(layers)}")
        planned = _copied(source, architecture, name, layer, match[2] if match else name)
        (layers[layer] if match else plan).append(planned)
    for layer in layers:
        if source.is_moe_layer(layer):
            layers[layer] += _experts(source, architecture, layer)
    names = [tensor.name for tensor in plan]
    if architecture.needs_output and "output.weight" not in names:
        embedding = plan[names.index("token_embd.weight")]
        plan.append(PlannedTensor(name="output.weight", shape=embedding.shape, read=embedding.read))
    if source.rope_type == "llama3":
        plan.append(
            PlannedTensor(name="rope_freqs.weight", shape=(source.head_dim // 2,), read=lambda: rope_factors(source))
        )
    return plan + [tensor for layer in layers.values() for tensor in layer]


def _copied(source: GGUFSource, architecture: Architecture, name: str, layer: int, short: str) -> PlannedTensor:
    """A tensor that is in the file as it is, but for the order of rows of q and k."""
    known = OUTSIDE if layer < 0 else IN_LAYER
    if short not in known:
        raise ValueError(f"{source.folder.path}: tensor {name} has no place in a GGUF file of {architecture.name}")
    new = known[short].replace("ffn_norm.", f"{architecture.ffn_norm}.")

    def read() -> Tensor:
        tensor = source.folder.read(name)
        if architecture.pairs_interleaved and new.startswith("attn_q."):
            return interleave_pairs(tensor, source.decoder.num_attention_heads)
        if architecture.pairs_interleaved and new.startswith("attn_k."):
            return interleave_pairs(tensor, source.num_kv_heads)
        return tensor

    full = new if layer < 0 else f"blk.{layer}.{new}"
    return PlannedTensor(name=full, shape=source.folder.shape(name), read=read, layer=layer)


def interleave_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of q or k from rotary halves (i, i + head_dim / 2) to pairs of neighbours (2 i, 2 i + 1)."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def rope_factors(source: GGUFSource) -> Tensor:
    """(head_dim / 2,) fp32 divisors of the rotary frequencies, of Llama 3's scaling.

    Frequencies whose wavelength exceeds the original context are divided by the factor, short ones by 1, those between by
    an interpolation of the two, as `transformers` computes it.
    """
    rope, dim = source.decoder.rope_parameters, source.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


class _LayerReader:
    """Reads the MoE of a layer once for all its tensors, which come one after the other."""

    def __init__(self, source: GGUFSource, architecture: Architecture, layer: int) -> None:
        self._source, self._architecture, self._layer = source, architecture, layer
        self._weights: MoEWeights | None = None

    def read(self, pick: Callable[[MoEWeights], Tensor | None], is_last: bool) -> Tensor:
        """What ``pick`` takes of the layer's weights; after the last one they are freed."""
        if self._weights is None:
            config, like = self._source.config, self._architecture.like
            assert config is not None and like is not None
            self._weights = like.rewrite(config, self._source.moe_weights(self._layer))
        tensor = pick(self._weights)
        assert tensor is not None
        if is_last:
            self._weights = None
        return tensor


def _experts(source: GGUFSource, architecture: Architecture, layer: int) -> list[PlannedTensor]:
    """The MoE of a layer as it is after ``architecture.like.rewrite``."""
    assert source.config is not None
    spec, dim = source.config.spec, source.decoder.hidden_size
    hidden, num_experts = spec.hidden(source.decoder.intermediate_size), spec.num_experts
    parts: dict[str, tuple[tuple[int, ...], Callable[[MoEWeights], Tensor | None]]] = {
        "ffn_gate_inp.weight": ((num_experts, dim), lambda moe: moe.router["weight"]),
        "ffn_gate_exps.weight": ((num_experts, hidden, dim), lambda moe: moe.gate_up_EHD[:, :hidden]),
        "ffn_up_exps.weight": ((num_experts, hidden, dim), lambda moe: moe.gate_up_EHD[:, hidden:]),
        "ffn_down_exps.weight": ((num_experts, dim, hidden), lambda moe: moe.down_EDF),
    }
    if architecture.generic_gate:
        parts["exp_probs_b.bias"] = ((num_experts,), lambda moe: moe.router.get("bias_E", torch.zeros(num_experts)))
    shared = (max(spec.num_shared_experts, 1) if architecture.generic_gate else spec.num_shared_experts) * hidden
    if shared:
        parts |= {
            "ffn_gate_shexp.weight": ((shared, dim), lambda moe: _there(moe.shared_gate_up_HD)[:shared]),
            "ffn_up_shexp.weight": ((shared, dim), lambda moe: _there(moe.shared_gate_up_HD)[shared:]),
            "ffn_down_shexp.weight": ((dim, shared), lambda moe: moe.shared_down_DF),
        }
    if spec.shared_gate:
        parts["ffn_gate_inp_shexp.weight"] = ((dim,), lambda moe: _shared_gate(moe, layer))
    reader, last = _LayerReader(source, architecture, layer), list(parts)[-1]
    return [
        PlannedTensor(
            name=f"blk.{layer}.{name}", shape=shape, read=partial(reader.read, pick, name == last), layer=layer
        )
        for name, (shape, pick) in parts.items()
    ]


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _shared_gate(moe: MoEWeights, layer: int) -> Tensor:
    """(D,) of the shared experts' gate.

    Raises:
        ValueError: it is zero.
    """
    gate_1D = _there(moe.shared_gate_1D)
    if not gate_1D.any():
        # The sigmoid is computed as silu(z) / z.
        raise ValueError(
            f"the gate of the shared experts of layer {layer} is zero, for which llama.cpp's qwen2moe computes NaN; set "
            "moe.shared_gate=false and halve the down-projection of the shared experts, which is the same function"
        )
    return gate_1D.flatten()
