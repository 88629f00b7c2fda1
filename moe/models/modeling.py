"""`MoEForCausalLM`: any dense Hugging Face decoder with MoE layers where its FFNs were.

The decoder is built by transformers and keeps its own names (``model.layers.3.self_attn...``, ``lm_head``), so attention,
rotary embeddings, caches and generation are transformers' code. Only ``layers.N.mlp`` is ours.

Legend: B batch, L sequence, V vocabulary, T = B * L.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from moe.layer import MoELayer, moe_layers, notice_optimizer_step
from moe.models.config import MoEConfig
from moe.observe import RoutingContext, record_loss_scale
from moe.routers import ROUTERS
from moe.scaling.mup import scale_initial

# Config fields by which some decoders change the logits after `lm_head`, with the values that do nothing; ours never does.
LOGIT_CHANGES = {
    "final_logit_softcapping": None,  # Gemma
    "logits_soft_cap": None,  # RecurrentGemma
    "logit_scale": 1,  # Cohere
    "logits_scaling": 1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
}


class MoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with MoE layers; `from_pretrained`, `generate`, PEFT and `Trainer` work as with any other.

    The returned loss is the cross-entropy alone. Balance losses act on the gradients (see `moe.observe`) with the same
    scale as the loss, whatever the trainer multiplies it by; ``layer.stats`` has their values. A loss computed outside
    from the logits has to pass through ``moe.observe.record_loss_scale(loss, model.routing_context)`` for that.
    """

    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = sorted({name for router in ROUTERS.values() for name in router.fp32_buffers})

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        text_config, spec = config.get_text_config(), config.spec
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict):  # what transformers knows is an object by now; the rest it skips
            raise ValueError(
                f"the model is quantised by {quantization.get('quant_method')!r}, which transformers does not load; use "
                "moe.quant.load.load_simulated"
            )
        if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"text_config.model_type={text_config.model_type!r} is not a causal decoder of transformers"
            )
        for name, neutral in LOGIT_CHANGES.items():
            if getattr(text_config, name, neutral) != neutral:
                raise ValueError(
                    f"text_config.{name}={getattr(text_config, name)} of model_type={text_config.model_type!r} changes "
                    f"the logits, which is not supported; set it to {'null' if neutral is None else neutral}"
                )
        decoder_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
        dense = decoder_class(text_config)
        layers = getattr(getattr(dense, "model", None), "layers", None)
        if layers is None or not hasattr(dense, "lm_head") or not all(hasattr(layer, "mlp") for layer in layers):
            raise ValueError(
                f"text_config.model_type={text_config.model_type!r} keeps its FFNs elsewhere than model.layers[i].mlp; "
                "use a Llama-, Mistral- or Qwen-like decoder"
            )
        if spec.only_layers is not None and max(spec.only_layers) >= len(layers):
            raise ValueError(f"moe.only_layers={list(spec.only_layers)} goes beyond the {len(layers)} layers (from 0)")
        if not any(spec.is_moe_layer(index) for index in range(len(layers))):
            raise ValueError(
                f"moe.first_dense_layers={spec.first_dense_layers} and moe.every={spec.every} leave none of the "
                f"{len(layers)} layers to be an MoE; lower them"
            )
        self.routing_context = RoutingContext()
        for index, layer in enumerate(layers):
            if spec.is_moe_layer(index):
                layer.mlp = MoELayer(text_config.hidden_size, spec, text_config.intermediate_size, self.routing_context)
                if problem := layer.mlp.router.causal_problem():
                    raise ValueError(problem)
        self.model, self.lm_head = dense.model, dense.lm_head
        self.vocab_size = text_config.vocab_size
        self._no_split_modules = list(dense._no_split_modules or [])
        self.post_init()

    @torch.no_grad()
    @guard_torch_init_functions()  # makes nn.init.* leave loaded weights alone
    def initialize_weights(self) -> None:
        """Initialise what is not loaded; transformers dispatches to the decoder's own rule, which skips our layers."""
        fresh = {name for name, parameter in self.named_parameters() if not _is_loaded(parameter)}
        super().initialize_weights()
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        for layer in moe_layers(self).values():
            layer.reset_parameters(std)
        scale_initial(self, fresh)

    def train(self, mode: bool = True) -> Self:
        """As any module; evaluation sees the selection bias after the last optimizer step."""
        if not mode:
            self._finish_noticed_step()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As any module; what is saved after an optimizer step has that step's selection bias."""
        self._finish_noticed_step()
        return super().state_dict(*args, **kwargs)

    def _finish_noticed_step(self) -> None:
        """Close the optimizer step that layers otherwise notice in the next micro-batch only.

        Where counts are reduced over ranks a training loop does it: one rank alone may save or evaluate here.
        """
        layers = [layer for layer in moe_layers(self).values() if layer.reduce_counts is None]
        if any(layer.stats.num_micro_batches for layer in layers):
            notice_optimizer_step(layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' decoders: logits (B, L, V), and the loss when ``labels`` (B, L) are given."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        mask_T = None
        # Else the mask covers cached tokens too, or is one made for the attention (4-D, or a dict by kind of layer).
        if isinstance(attention_mask, Tensor) and tokens is not None and attention_mask.shape == tokens.shape[:2]:
            mask_T = attention_mask.reshape(-1).bool()
        self.routing_context.token_mask_T = mask_T
        self.routing_context.input_ids_T = None if input_ids is None else input_ids.reshape(-1)
        if self.training and not torch.compiler.is_compiling():
            # All layers at once, since some routers look at the whole model's load.
            notice_optimizer_step(list(moe_layers(self).values()))
        if use_cache is None:  # the decoder would look in its own config only
            use_cache = getattr(self.config, "use_cache", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BLD = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_BLD[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self._loss(logits, labels, shift_labels, num_items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=self.vocab_size,
            num_items_in_batch=num_items,
            shift_labels=shift_labels.contiguous(),
        )
        share: Tensor | float = 1.0
        if num_items is not None:  # the loss is a part of the step's mean, so auxiliary losses must be too
            share = (shift_labels != -100).sum().to(loss.device) / torch.as_tensor(num_items, device=loss.device)
        return record_loss_scale(loss, self.routing_context, share)


def _is_loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers marked the values as those of a checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know ``model_type: moe_decoder``."""
    AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)
