"""Architectures with a softmax router: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE.

Mixtral (arXiv 2401.04088) always divides the chosen weights by their sum; the others have a switch for it, and OLMoE's (arXiv
2409.02060) is off in vLLM and llama.cpp whatever its config says. Qwen2-MoE always has shared experts, with a gate per token.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moe.models.config import MoEConfig
from moe.models.moe_weights import MoEWeights
from moe.models.stock.decoder import Decoder, decoder_config, dense_decoder, describe, head_dim, uniform_window
from moe.models.stock.family import (
    Names,
    StockFormat,
    aux_coef_from_stock,
    aux_coef_to_stock,
    scaled,
    zero_shared,
)
from moe.models.stock.fit import Gate, Limits, dense_layers

# Width of the shared experts that Qwen2-MoE gets where a model has none: as little as tensor parallelism of 8 and blocks of 8
# allow.
EMPTY_SHARED = 64
# The gate of shared experts that had none reads the first input only, and weakly: sigmoid(2^-20 x_0) is 1/2 to a relative 5e-7
# x_0. An exact zero would be NaN in llama.cpp, which computes the sigmoid of z as silu(z) / z.
HALF_GATE = 2.0**-20


class SoftmaxFormat(StockFormat):
    """What the four have in common."""

    def _moe_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        """Number of experts, top-k and the balance loss."""
        layers = decoder_config(config).num_hidden_layers - len(dense_layers(config))
        return {
            "num_experts_per_tok": gate.rule.top_k,
            "router_aux_loss_coef": aux_coef_to_stock(config, gate.rule.top_k, layers),
            "output_router_logits": False,
        }

    def _ours(
        self, config: Any, text_config: PreTrainedConfig, dense: list[int], norm_topk_prob: bool, **moe: Any
    ) -> MoEConfig:
        """Our config around ``text_config``; ``dense`` are the layers that are no MoEs."""
        router = {"name": "topk", "top_k": config.num_experts_per_tok, "renormalize": norm_topk_prob}
        if config.num_experts_per_tok == 1 and norm_topk_prob:
            router["frozen"] = True  # its weight is always 1, so it cannot learn from the loss
        sparse = [layer for layer in range(config.num_hidden_layers) if layer not in dense]
        if not sparse:
            raise ValueError(f"the {self.name} model has no MoE layer: mlp_only_layers={config.mlp_only_layers}")
        spec = {
            "num_experts": config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts,
            "router": router,
            "balance": {"aux_coef": aux_coef_from_stock(config, len(sparse))},
        }
        if dense:
            spec["only_layers"] = sparse
        return MoEConfig(text_config=text_config, moe=spec | moe)


class MixtralFormat(SoftmaxFormat):
    """Mixtral: every layer an MoE, no shared experts, weights that sum to 1."""

    name, architecture, config_class = "mixtral", "MixtralForCausalLM", MixtralConfig
    limits = Limits(score="softmax", renormalize=True, shared="none", dense_layers="none", windows="uniform")
    names = Names(block="block_sparse_moe", gate="w1", up="w3", down="w2")

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        text_config = decoder_config(config)
        return self._moe_fields(config, gate) | {
            "num_local_experts": config.spec.num_experts,
            "intermediate_size": config.spec.hidden(text_config.intermediate_size),
            "sliding_window": uniform_window(describe(text_config)),
            "router_jitter_noise": float(config.spec.router.get("jitter", 0.0)),
        }

    def from_stock(self, config: Any) -> MoEConfig:
        """Around Mistral, or Llama where no window slides."""
        window = config.sliding_window
        width = config.intermediate_size
        text_config = dense_decoder(config, Decoder(windows=(window,) * config.num_hidden_layers), width)
        assert text_config is not None
        made = self._ours(config, text_config, [], True, expert_hidden=width)
        assert made.moe is not None
        made.moe["router"]["jitter"] = config.router_jitter_noise
        return made


class QwenFormat(SoftmaxFormat):
    """What both Qwen formats have in common: any layer may be dense, and a switch for the division by the sum."""

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        text_config = decoder_config(config)
        return self._moe_fields(config, gate) | {
            "num_experts": config.spec.num_experts,
            "norm_topk_prob": gate.rule.renormalize,
            "intermediate_size": text_config.intermediate_size,
            "moe_intermediate_size": config.spec.hidden(text_config.intermediate_size),
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(config),
        }

    def _from_stock(self, config: Any, decoder: Decoder, **moe: Any) -> MoEConfig:
        text_config = dense_decoder(config, decoder, config.intermediate_size)
        if text_config is None:
            raise ValueError(f"no dense decoder has the attention of this {self.name} model: {decoder}")
        dense = [
            layer
            for layer in range(config.num_hidden_layers)
            if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
        ]
        moe |= {"expert_hidden": config.moe_intermediate_size}
        return self._ours(config, text_config, dense, config.norm_topk_prob, **moe)


class Qwen3MoEFormat(QwenFormat):
    """Qwen3-MoE: norms of queries and keys, no shared experts."""

    name, architecture, config_class = "qwen3_moe", "Qwen3MoeForCausalLM", Qwen3MoeConfig
    limits = Limits(
        score="softmax",
        renormalize=None,
        shared="none",
        dense_layers="any",
        qkv_bias=(False, True),
        output_bias=(False, True),
        qk_norm=(True,),
        windows="uniform",
    )

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        decoder = describe(decoder_config(config))
        window = uniform_window(decoder)
        return super()._stock_fields(config, gate) | {
            "attention_bias": decoder.qkv_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }

    def from_stock(self, config: Any) -> MoEConfig:
        """Around Qwen3."""
        windows = (config.sliding_window,) * config.num_hidden_layers
        bias = config.attention_bias
        return self._from_stock(config, Decoder(windows=windows, qkv_bias=bias, output_bias=bias, qk_norm=True))


class Qwen2MoEFormat(QwenFormat):
    """Qwen2-MoE: biases of queries, keys and values, and gated shared experts."""

    name, architecture, config_class = "qwen2_moe", "Qwen2MoeForCausalLM", Qwen2MoeConfig
    limits = Limits(
        score="softmax",
        renormalize=None,
        shared="gated",
        dense_layers="any",
        qkv_bias=(False, True),
        any_head_dim=False,
    )
    names = Names(shared="shared_expert", shared_gate="shared_expert_gate")

    def notes(self, config: MoEConfig) -> list[str]:
        """Biases and shared experts that the model lacks."""
        found, spec = super().notes(config), config.spec
        if not describe(decoder_config(config)).qkv_bias:
            found.append("query, key and value projections get biases of zero, which servers expect")
        if not spec.num_shared_experts:
            found.append(f"shared experts of width {EMPTY_SHARED} that give zero are added")
        elif not spec.shared_gate:
            found.append("the shared experts' down_proj is doubled, and their gate is made to give 1/2")
        return found

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        spec, fields = config.spec, super()._stock_fields(config, gate)
        width = spec.num_shared_experts * fields["moe_intermediate_size"] or EMPTY_SHARED
        return fields | {
            "shared_expert_intermediate_size": width,
            "qkv_bias": True,
            "use_sliding_window": False,
            "sliding_window": None,
        }

    def from_stock(self, config: Any) -> MoEConfig:
        """Around Qwen2, or Llama where there are no biases."""
        window = config.sliding_window or None
        windows = tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
        shared = -(-config.shared_expert_intermediate_size // config.moe_intermediate_size)
        decoder = Decoder(windows=windows, qkv_bias=config.qkv_bias)
        return self._from_stock(config, decoder, num_shared_experts=shared, shared_gate=bool(shared))

    def added(self, config: MoEConfig, dtype: torch.dtype, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Zero biases where the decoder has none: servers make the parameters without looking at ``qkv_bias``."""
        text_config = decoder_config(config)
        if describe(text_config).qkv_bias:
            return
        heads = {"q": text_config.num_attention_heads, "k": text_config.num_key_value_heads}
        for part, number in (heads | {"v": heads["k"]}).items():
            yield f"{prefix}self_attn.{part}_proj.bias", torch.zeros(number * head_dim(text_config), dtype=dtype)

    def rewrite(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Shared experts with a gate, whatever there was."""
        weights = super().rewrite(config, weights)
        if weights.shared_gate_1D is not None:
            return weights
        if weights.shared_down_DF is None:
            weights = zero_shared(weights, EMPTY_SHARED)
        assert weights.shared_down_DF is not None
        gate_1D = weights.shared_down_DF.new_zeros(1, weights.shared_down_DF.shape[0])
        gate_1D[0, 0] = HALF_GATE
        return replace(weights, shared_down_DF=scaled(weights.shared_down_DF, 2.0), shared_gate_1D=gate_1D)


class OlmoeFormat(SoftmaxFormat):
    """OLMoE: norms over all queries and over all keys, which no plain decoder has; a model has to come from OLMoE to go there."""

    name, architecture, config_class = "olmoe", "OlmoeForCausalLM", OlmoeConfig
    limits = Limits(score="softmax", renormalize=None, shared="none", dense_layers="none")

    def refusals(self, config: MoEConfig) -> list[str]:
        """Any other decoder."""
        if decoder_config(config).model_type != self.name:
            return [f"text_config.model_type={decoder_config(config).model_type!r}: its attention is OLMoE's own"]
        return super().refusals(config)

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        text_config = decoder_config(config)
        return self._moe_fields(config, gate) | {
            "num_experts": config.spec.num_experts,
            "norm_topk_prob": gate.rule.renormalize,
            "intermediate_size": config.spec.hidden(text_config.intermediate_size),
        }

    def from_stock(self, config: Any) -> MoEConfig:
        """Around its own attention."""
        # Its layers are built with these experts before ours take their place.
        alone = config.to_dict() | {"num_experts": 1, "num_experts_per_tok": 1}
        text_config = OlmoeConfig(**alone)
        return self._ours(config, text_config, [], config.norm_topk_prob, expert_hidden=config.intermediate_size)


MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE = MixtralFormat(), Qwen2MoEFormat(), Qwen3MoEFormat(), OlmoeFormat()
