"""Expert weights: the bank of routed experts, stacked, and the shared experts that every token passes.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), e local experts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.kernels import ops
from moe.kernels.reference import activate
from moe.types import DEFAULT_FFN, FFNOptions, Routing


class ExpertBank(nn.Module):
    """The routed experts that live on this rank, as two stacked weights named as in transformers' fused experts.

    Args:
        num_experts: e.
        dim: D.
        hidden: F.
        activation: "swiglu" or "gelu".
        options: memory and precision. ``main_grads`` come from the parameters: where both have an attribute ``main_grad`` (as
            Megatron-Core and others give them), backward adds to these buffers and leaves ``grad`` alone.

    Attributes:
        gate_up_proj: (e, H, D); for SwiGLU the gate's rows first, then the up-projection's.
        down_proj: (e, D, F).
    """

    def __init__(
        self, num_experts: int, dim: int, hidden: int, activation: str, options: FFNOptions = DEFAULT_FFN
    ) -> None:
        super().__init__()
        assert options.main_grads is None, "buffers belong to the parameters"
        self.activation, self.options = activation, options
        height = 2 * hidden if activation == "swiglu" else hidden
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, height, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden))

    @property
    def num_experts(self) -> int:
        """e, experts on this rank."""
        return self.gate_up_proj.shape[0]

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, (T, D); expert ids are those of this rank."""
        dtype = (
            torch.get_autocast_dtype(x_TD.device.type) if torch.is_autocast_enabled(x_TD.device.type) else x_TD.dtype
        )
        options = self.options
        main_grads = [getattr(weight, "main_grad", None) for weight in (self.gate_up_proj, self.down_proj)]
        if main_grads[0] is not None and main_grads[1] is not None:
            options = replace(options, main_grads=(main_grads[0], main_grads[1]))
        weights = (self.gate_up_proj.to(dtype), self.down_proj.to(dtype))
        return ops.expert_ffn(x_TD.to(dtype), routing, *weights, self.activation, options)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        num_experts, dim, hidden = self.down_proj.shape
        return f"num_experts={num_experts}, dim={dim}, hidden={hidden}, activation={self.activation}"


def set_ffn_options(model: nn.Module, options: FFNOptions) -> None:
    """Let all routed experts of a model compute with ``options``; a property of the run, not of the model."""
    for module in model.modules():
        if isinstance(module, ExpertBank):
            module.options = options


class SharedExperts(nn.Module):
    """Experts that every token passes, fused into one FFN of S * F (DeepSeekMoE, arXiv 2401.06066 eq. 9).

    Args:
        dim: D.
        hidden: S * F.
        activation: "swiglu" or "gelu".
        gated: scale the output per token by sigmoid(x w) (Qwen2-MoE).
    """

    def __init__(self, dim: int, hidden: int, activation: str, gated: bool) -> None:
        super().__init__()
        self.activation = activation
        height = 2 * hidden if activation == "swiglu" else hidden
        self.gate_up_proj = nn.Linear(dim, height, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.gate = nn.Linear(dim, 1, bias=False) if gated else None

    def reset_parameters(self, std: float) -> None:
        """Normal weights of deviation ``std``."""
        for linear in (self.gate_up_proj, self.down_proj, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        y_TD = self.down_proj(activate(self.gate_up_proj(x_TD), self.activation))
        return y_TD if self.gate is None else y_TD * self.gate(x_TD).sigmoid()


class Later:
    """A result that is computed when it is first asked for: shared experts, which an exchange may run while tokens travel."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """The result."""
        if self._result is None:
            self._result = self._compute()
        return self._result
