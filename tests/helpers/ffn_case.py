"""Inputs of `expert_ffn`, and its output with every gradient by an implementation or by the oracle."""

import os
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers import oracles
from helpers.close import assert_close
from moe.kernels import ops
from moe.types import DEFAULT_FFN, FFNOptions, Routing

GRADIENTS = ("dx", "dweights", "dw_up", "dw_down")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: leaf tensors, assignments, and the gradient ``dy_TD`` that comes back."""

    x_TD: Tensor
    weights_N: Tensor
    w_up_EHD: Tensor
    w_down_EDF: Tensor
    dy_TD: Tensor
    token_ids: list[int]
    expert_ids: list[int]
    top_k: int | None
    activation: str

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Fresh copies of x, weights, w_up, w_down, converted if asked, in the strides of the originals."""
        return [
            leaf.detach().clone().to(dtype or leaf.dtype)
            for leaf in (self.x_TD, self.weights_N, self.w_up_EHD, self.w_down_EDF)
        ]


def make_case(
    token_ids: list[int],
    expert_ids: list[int],
    *,
    top_k: int | None = None,
    num_tokens: int,
    num_experts: int,
    dim: int = 6,
    hidden: int = 4,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random values of order one everywhere, so that no term hides behind another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    height = 2 * hidden if activation == "swiglu" else hidden
    return Case(
        x_TD=normal(num_tokens, dim),
        weights_N=torch.rand(len(token_ids), generator=generator) + 0.1,
        w_up_EHD=normal(num_experts, height, dim) / dim**0.5,
        w_down_EDF=normal(num_experts, dim, hidden) / hidden**0.5,
        dy_TD=normal(num_tokens, dim),
        token_ids=token_ids,
        expert_ids=expert_ids,
        top_k=top_k,
        activation=activation,
    )


def fixed_k(num_tokens: int, num_experts: int, top_k: int, **kwargs: object) -> Case:
    """Every token to K different experts at random."""
    rng = random.Random(num_tokens * 1000 + num_experts * 10 + top_k)
    return make_case(
        [t for t in range(num_tokens) for _ in range(top_k)],
        [e for _ in range(num_tokens) for e in rng.sample(range(num_experts), top_k)],
        top_k=top_k,
        num_tokens=num_tokens,
        num_experts=num_experts,
        **kwargs,
    )


def routing_of(case: Case, weights_N: Tensor) -> Routing:
    expert_ids_N = torch.tensor(case.expert_ids, dtype=torch.int64, device=weights_N.device)
    num_experts = case.w_up_EHD.shape[0]
    return Routing(
        num_tokens=case.x_TD.shape[0],
        num_experts=num_experts,
        token_ids_N=torch.tensor(case.token_ids, dtype=torch.int64, device=weights_N.device),
        expert_ids_N=expert_ids_N,
        weights_N=weights_N,
        counts_E=torch.bincount(expert_ids_N, minlength=num_experts),
        top_k=case.top_k,
    )


def forward(case: Case, leaves: list[Tensor], options: FFNOptions = DEFAULT_FFN) -> Tensor:
    """`ops.expert_ffn` on ``leaves``; the Triton kernels run on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() and os.environ.get("MOE_KERNELS") == "triton" else "cpu"
    x_TD, weights_N, w_up_EHD, w_down_EDF = (leaf.to(device) for leaf in leaves)
    y_TD = ops.expert_ffn(x_TD, routing_of(case, weights_N), w_up_EHD, w_down_EDF, case.activation, options)
    return y_TD.to(leaves[0].device)


def run(
    case: Case, needs: tuple[bool, bool, bool, bool] = (True, True, True, True), options: FFNOptions = DEFAULT_FFN
) -> dict[str, Tensor | None]:
    """Output and gradients of `ops.expert_ffn`; ``needs`` says which leaves require one."""
    leaves = [leaf.requires_grad_(need) for leaf, need in zip(case.leaves(), needs, strict=True)]
    y_TD = forward(case, leaves, options)
    if any(needs):
        y_TD.backward(case.dy_TD)
    else:
        assert not y_TD.requires_grad
    return {"y": y_TD.detach()} | {name: leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}


def expect(case: Case) -> dict[str, Tensor]:
    """Output and gradients of the double loop in float64."""
    leaves = [leaf.requires_grad_() for leaf in case.leaves(torch.float64)]
    x_TD, weights_N, w_up_EHD, w_down_EDF = leaves
    y_TD = oracles.expert_ffn(x_TD, case.token_ids, case.expert_ids, weights_N, w_up_EHD, w_down_EDF, case.activation)
    grads = torch.autograd.grad(y_TD, leaves, case.dy_TD.double(), allow_unused=True, materialize_grads=True)
    return {"y": y_TD.detach()} | dict(zip(GRADIENTS, grads, strict=True))


def check(case: Case) -> None:
    """The chosen implementation against the oracle: output, every gradient, and their dtypes."""
    got, expected = run(case), expect(case)
    dtype = case.x_TD.dtype
    for name, value in expected.items():
        assert_close(name, got[name], value, dtype)
    for name, value in got.items():
        assert value is not None
        assert value.dtype == (torch.float32 if name == "dweights" else dtype), name


def with_tensors(case: Case, **tensors: Tensor) -> Case:
    """The case with some of its tensors replaced."""
    return replace(case, **tensors)
