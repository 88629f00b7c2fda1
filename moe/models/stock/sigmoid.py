"""Architectures with DeepSeek-V3's router (arXiv 2412.19437 eq. 12-16): GLM4-MoE, DeepSeek-V3, dots.llm1.

Sigmoid scores in fp32, a bias that only selects, groups, a scale; shared experts without a gate; dense layers at the bottom.
GLM4-MoE has the attention of Llama, Qwen2 and Qwen3, so carved models go there. A multi-token prediction layer above the last
one, which released checkpoints have, is not imported.
"""

from dataclasses import replace
from typing import Any

from transformers import DeepseekV3Config, Dots1Config, Glm4MoeConfig, PreTrainedConfig

from moe.models.config import MoEConfig
from moe.models.moe_weights import MoEWeights
from moe.models.stock.decoder import Decoder, decoder_config, dense_decoder, describe
from moe.models.stock.family import Names, StockFormat, zero_shared
from moe.models.stock.fit import Gate, Limits, dense_layers


class SigmoidFormat(StockFormat):
    """What the three have in common."""

    names = Names(shared="shared_experts", bias="e_score_correction_bias")

    def notes(self, config: MoEConfig) -> list[str]:
        """Shared experts that the model lacks."""
        found = super().notes(config)
        if not config.spec.num_shared_experts:
            found.append("one shared expert that gives zero is added")
        return found

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        text_config = decoder_config(config)
        spec, rule = config.spec, gate.rule
        return {
            "num_experts_per_tok": rule.top_k,
            "n_routed_experts": spec.num_experts,
            "n_shared_experts": max(spec.num_shared_experts, 1),
            "intermediate_size": text_config.intermediate_size,
            "moe_intermediate_size": spec.hidden(text_config.intermediate_size),
            "first_k_dense_replace": len(dense_layers(config)),
            "norm_topk_prob": rule.renormalize,
            "routed_scaling_factor": float(rule.route_scale),
            "n_group": rule.num_groups,
            "topk_group": rule.top_k_groups,
            "output_router_logits": False,
        }

    def rewrite(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """With a shared expert."""
        weights = super().rewrite(config, weights)
        return zero_shared(weights, weights.down_EDF.shape[2]) if weights.shared_down_DF is None else weights

    def _decoder(self, config: Any) -> Decoder | None:
        """Attention that plain decoders have, or ``None``."""
        return None

    def from_stock(self, config: Any) -> MoEConfig:
        """Around the plain decoder with the same attention, or around its own with dense FFNs."""
        if config.first_k_dense_replace >= config.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={config.first_k_dense_replace} leaves no MoE among the {config.num_hidden_layers} layers"
            )
        decoder = self._decoder(config)
        text_config = None if decoder is None else dense_decoder(config, decoder, config.intermediate_size)
        router = {
            "name": "noaux_tc",
            "top_k": config.num_experts_per_tok,
            "renormalize": config.norm_topk_prob,
            "num_groups": config.n_group,
            "top_k_groups": config.topk_group,
            "route_scale": float(config.routed_scaling_factor),
        }
        if config.num_experts_per_tok == 1 and config.norm_topk_prob:
            router["frozen"] = True  # its weight is constant, so it cannot learn from the loss
        moe = {
            "num_experts": config.n_routed_experts,
            "expert_hidden": config.moe_intermediate_size,
            "num_shared_experts": config.n_shared_experts or 0,
            "first_dense_layers": config.first_k_dense_replace,
            "router": router,
            "balance": {"aux_coef": 0.0},  # their configs have no loss
        }
        return MoEConfig(text_config=text_config or self._own_decoder(config), moe=moe)

    def _own_decoder(self, config: Any) -> PreTrainedConfig:
        """The same architecture with nothing but dense layers."""
        dense = {"first_k_dense_replace": config.num_hidden_layers, "num_mtp_layers": 0}
        fields = {
            key: value for key, value in config.to_dict().items() if key not in ("num_nextn_predict_layers", "dtype")
        }
        return self.config_class(**(fields | dense))


class Glm4MoEFormat(SigmoidFormat):
    """GLM4-MoE (GLM-4.5, arXiv 2508.06471)."""

    name, architecture, config_class = "glm4_moe", "Glm4MoeForCausalLM", Glm4MoeConfig
    limits = Limits(
        score="sigmoid",
        renormalize=None,
        shared="plain",
        dense_layers="first",
        qkv_bias=(False, True),
        qk_norm=(False, True),
    )

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        fields = super()._stock_fields(config, gate) | {"num_mtp_layers": 0}
        text_config = decoder_config(config)
        if text_config.model_type == self.name:
            return fields
        decoder = describe(text_config)
        # Readers rotate half of a head where the config does not say how much.
        rope = dict(text_config.rope_parameters) | {"partial_rotary_factor": 1.0}
        return fields | {
            "attention_bias": decoder.qkv_bias,
            "use_qk_norm": decoder.qk_norm,
            "rope_parameters": rope,
        }

    def _decoder(self, config: Any) -> Decoder | None:
        if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return None
        windows = (None,) * config.num_hidden_layers
        return Decoder(windows=windows, qkv_bias=config.attention_bias, qk_norm=config.use_qk_norm)


class Dots1Format(SigmoidFormat):
    """dots.llm1: Qwen3's attention."""

    name, architecture, config_class = "dots1", "Dots1ForCausalLM", Dots1Config
    limits = replace(Glm4MoEFormat.limits, output_bias=(False, True), qk_norm=(True,))

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        return super()._stock_fields(config, gate) | {
            "attention_bias": describe(decoder_config(config)).qkv_bias,
            "sliding_window": None,
        }

    def _decoder(self, config: Any) -> Decoder:
        windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
        bias = config.attention_bias
        return Decoder(windows=windows, qkv_bias=bias, output_bias=bias, qk_norm=True)


class DeepseekV3Format(SigmoidFormat):
    """DeepSeek-V3: latent attention, which no plain decoder has; a model has to come from DeepSeek-V3 to go there."""

    name, architecture, config_class = "deepseek_v3", "DeepseekV3ForCausalLM", DeepseekV3Config
    limits = Limits(score="sigmoid", renormalize=None, shared="plain", dense_layers="first")

    def refusals(self, config: MoEConfig) -> list[str]:
        """Any other decoder."""
        if decoder_config(config).model_type != self.name:
            return [f"text_config.model_type={decoder_config(config).model_type!r}: its attention is DeepSeek-V3's own"]
        return super().refusals(config)

    def _stock_fields(self, config: MoEConfig, gate: Gate) -> dict[str, Any]:
        return super()._stock_fields(config, gate) | {"num_mtp_layers": 0}


GLM4_MOE, DOTS1, DEEPSEEK_V3 = Glm4MoEFormat(), Dots1Format(), DeepseekV3Format()
