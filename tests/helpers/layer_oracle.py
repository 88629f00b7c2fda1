"""An MoE layer in float64 by the double loop, from the parameters of a real one; and how to compare gradients."""

import torch
from torch import Tensor, nn

from helpers import oracles
from helpers.close import assert_close
from moe.layer import MoELayer, MoESpec
from moe.observe import RoutingContext
from moe.routers.balance import BalanceConfig

NO_BALANCE = BalanceConfig(aux_coef=0.0)


def make_layer(dim: int = 6, *, std: float = 0.5, context: RoutingContext | None = None, **values: object) -> MoELayer:
    """A small layer whose weights are large enough that every part of it shows."""
    spec = MoESpec(**({"num_experts": 4, "expert_hidden": 5, "balance": NO_BALANCE} | values))
    layer = MoELayer(dim, spec, context=context)
    layer.reset_parameters(std)
    return layer


def same_weights(layer: MoELayer, **values: object) -> MoELayer:
    """A layer with the weights of ``layer`` and another spec."""
    other = make_layer(layer.dim, **values)
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the input and of every parameter that has one."""
    assert x.grad is not None
    found = {"x": x.grad.clone()}
    found |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, got[name], value, torch.float32)


def oracle_gradients(layer: MoELayer, x_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and all gradients of a layer with the "topk" router (softmax before), without losses and capacity."""
    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64_TD = x_TD.detach().double().requires_grad_()
    config, activation = layer.router.config, layer.spec.activation
    ids, weights_N = oracles.softmax_topk(x64_TD @ p["router.weight"].T, config.top_k, config.renormalize)
    token_ids = [t for t in range(len(x_TD)) for _ in range(config.top_k)]
    y_TD = oracles.expert_ffn(
        x64_TD, token_ids, ids, weights_N, p["experts.gate_up_proj"], p["experts.down_proj"], activation
    )
    if "shared_experts.down_proj.weight" in p:
        up_HD, down_DF = p["shared_experts.gate_up_proj.weight"], p["shared_experts.down_proj.weight"]
        shared_TD = oracles.dense_ffn(x64_TD, up_HD, down_DF, activation)
        if "shared_experts.gate.weight" in p:
            shared_TD = shared_TD / (1 + torch.exp(-x64_TD @ p["shared_experts.gate.weight"].T))
        y_TD = y_TD + shared_TD
    y_TD.backward(dy_TD.double())
    assert x64_TD.grad is not None
    return y_TD.detach(), {"x": x64_TD.grad} | {name: value.grad for name, value in p.items() if value.grad is not None}
