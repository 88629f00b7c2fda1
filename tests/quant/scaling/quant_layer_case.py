"""A decoder layer of a tiny model, what it sees on random tokens, and the model around it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe.models import MoEConfig, MoEForCausalLM
from moe.quant.inputs import LayerInputs
from moe.quant.layer import linears, moe_of
from moe.types import Routing
from tests.models.tiny import EXPERTS, VOCAB, decoder_config


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """Layer ``index`` of ``model`` and its inputs on ``ids_BL``."""

    model: MoEForCausalLM
    index: int
    ids_BL: Tensor
    inputs: LayerInputs

    @property
    def layer(self) -> nn.Module:
        return self.model.model.layers[self.index]

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the layer adds to the residual stream."""
        found: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            after = result[0] if isinstance(result, tuple) else result
            found.append(after - args[0])

        hook = self.layer.register_forward_hook(note)
        self.model(input_ids=self.ids_BL)
        hook.remove()
        return found[0]

    def captured(self) -> LayerInputs:
        """What the layer sees now."""
        return capture(self.model, self.index, self.ids_BL)


def make_case(
    kind: str | PreTrainedConfig = "llama", *, index: int = 0, seed: int = 0, outliers: bool = True, **moe: Any
) -> LayerCase:
    """A layer with gains, biases and routers that are not all alike; with outliers some channels are much larger."""
    torch.manual_seed(seed)
    text_config = decoder_config(kind) if isinstance(kind, str) else kind
    model = MoEForCausalLM(MoEConfig(text_config=text_config, moe={"num_experts": EXPERTS} | moe)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
            if outliers and name.endswith("layernorm.weight"):
                parameter.data[:2] *= 8
    ids_BL = torch.randint(2, VOCAB, (4, 24))
    return LayerCase(model=model, index=index, ids_BL=ids_BL, inputs=capture(model, index, ids_BL))


@torch.no_grad()
def capture(model: MoEForCausalLM, index: int, ids_BL: Tensor) -> LayerInputs:
    """By hooks, a tensor for each distinct input."""
    layer, kept, linear = model.model.layers[index], {}, {}
    routings: list[Routing] = []

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x_TQ = args[0].flatten(0, -2)
        linear[name] = kept.setdefault(x_TQ.data_ptr(), (args[0], x_TQ.clone()))[1]

    moe = moe_of(layer)
    watched = linears(layer) | ({} if moe is None else {"mlp": moe})
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in watched.items()]
    if moe is not None:
        hooks.append(moe.router.register_forward_hook(lambda _, __, routing: routings.append(routing)))
    model(input_ids=ids_BL)
    for hook in hooks:
        hook.remove()
    if moe is None:
        return LayerInputs(linear=linear)
    routing = routings[0]
    mine = [routing.expert_ids_N == expert for expert in range(routing.num_experts)]
    return LayerInputs(
        ffn_TD=linear.pop("mlp"),
        linear=linear,
        tokens_e=[routing.token_ids_N[one] for one in mine],
        weights_e=[routing.weights_N[one] for one in mine],
        counts_E=routing.counts_E,
    )


def without_tokens(inputs: LayerInputs, expert: int) -> LayerInputs:
    """As if the router had never chosen an expert."""
    tokens_e, weights_e = list(inputs.tokens_e), list(inputs.weights_e)
    tokens_e[expert], weights_e[expert] = tokens_e[expert][:0], weights_e[expert][:0]
    return replace(inputs, tokens_e=tokens_e, weights_e=weights_e)
